"""Hypothesis strategies for any protobuf message, and for bytes that nearly are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from fuzzing.mutations import EDGES

Pools = Mapping[str, Sequence[bytes]]
"""Name of a field -> values that mean something to whoever reads it."""

_INTEGER_BITS = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
}
_MOST_REPEATED = 3
_OFTEN = st.sampled_from([True] * 15 + [False])


def messages(kind: Descriptor, pools: Pools) -> st.SearchStrategy[Any]:
    """Messages of a kind, each field set or not; values from the pools as often as arbitrary ones."""
    made = GetMessageClass(kind)
    fields = {field.name: _values(field, pools) for field in kind.fields}

    @st.composite
    def message(draw: st.DrawFn) -> Any:
        names = [name for name in fields if draw(_OFTEN)]
        # Of a oneof the last one stays.
        return made(**{name: draw(fields[name]) for name in names[draw(st.integers(0, 3)) :] + names[:3]})

    return message()


def nearly(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly as they are, else changed in a few bytes, cut, doubled, or anything at all."""
    return usually(
        whole,
        st.one_of(
            whole.flatmap(_changed),
            st.tuples(whole, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]]),
            st.tuples(whole, whole).map(b"".join),
            st.binary(max_size=300),
        ),
    )


def usually(often: st.SearchStrategy[Any], seldom: st.SearchStrategy[Any], times: int = 4) -> st.SearchStrategy[Any]:
    """``often`` so many times as ``seldom``; ``one_of`` takes each once, however often it is given."""
    return st.sampled_from([True] * times + [False]).flatmap(lambda is_often: often if is_often else seldom)


@st.composite
def _changed(draw: st.DrawFn, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        changed[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(changed)


def _values(field: FieldDescriptor, pools: Pools) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        one = messages(field.message_type, pools)
    elif field.type == FieldDescriptor.TYPE_BOOL:
        one = st.booleans()
    elif field.type == FieldDescriptor.TYPE_BYTES:
        known = st.sampled_from(pools[field.name])
        one = usually(known, st.binary(max_size=100), 12)
    elif field.type == FieldDescriptor.TYPE_STRING:
        one = st.text(max_size=20)
    else:
        most = 2 ** _INTEGER_BITS[field.type] - 1
        one = st.sampled_from([edge for edge in EDGES if edge <= most]) | st.integers(0, most) | st.integers(0, 5000)
    return st.lists(one, max_size=_MOST_REPEATED) if field.is_repeated else one
