"""Calls of every RPC, from what a client would never send to what it nearly would."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from hypothesis import strategies as st

from fuzzing.messages import Pools, messages, nearly, usually
from fuzzing.pages import golden_objects
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc import admin_pb2, peer_pb2

METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for service in (peer_pb2.DESCRIPTOR.services_by_name["Peer"], admin_pb2.DESCRIPTOR.services_by_name["Admin"])
    for method in service.methods
)
"""All of both services, as ``protos/`` has them."""
OVERSIZED_BYTES = (8 << 20) + 1
DELETES = ("Delete", "DeleteCalibration")
"""What deletes."""
_SOMETIMES_OVERSIZED = ("Stat", "ReadPages")


@dataclasses.dataclass(frozen=True)
class Known:
    """What lies on the peer, or may come to.

    Attributes:
        kept: page objects that are stored and must stay.
        loose: page objects that may come and go.
        artifacts: calibrations, the first of which must stay.
    """

    kept: tuple[bytes, ...]
    loose: tuple[bytes, ...]
    artifacts: tuple[bytes, ...]

    @classmethod
    def golden(cls) -> Known:
        """Of the golden pages."""
        objects = golden_objects()
        return cls(tuple(objects[::2]), tuple(objects[1::2]), (b"a calibration", b"another", bytes(3_000_001)))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        path: of the method.
        sent: serialized messages.
        token: what is shown; empty for nothing.
        answers_read: messages that are taken before the call is cancelled; None to hear it out.
    """

    path: str
    sent: tuple[bytes, ...]
    token: str
    answers_read: int | None

    def __repr__(self) -> str:
        sent = ", ".join(f"{len(each)}:{each[:80].hex()}" for each in self.sent)
        return f"{self.path} token={self.token!r} answers_read={self.answers_read} [{sent}]"


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * 8 * len(others) + list(others))


def pools_of(known: Known, method: str) -> Pools:
    """Values of fields that mean something. What deletes is not told what must stay."""
    is_delete = method in DELETES
    objects = known.loose if is_delete else (*known.kept, *known.loose)
    keys = [PageObject(data).header.key for data in objects]
    hashes = [key.page_hash for key in keys]
    artifacts = [hashlib.sha256(data).digest() for data in known.artifacts[1 if is_delete else 0 :]]
    return {
        "namespace_digest": [*sorted({key.namespace_digest for key in keys}) * 6, bytes(32), bytes(31)],
        "page_hash": hashes,
        "page_hashes": [
            *hashes,
            *(hashes[i] + hashes[0] for i in range(3)),
            b"".join(hashes),
            b"".join(hashes) * 300,
            hashes[0][:31],
        ],
        "model_digest": [bytes(32), bytes(range(32)), bytes(33)],
        "digest": [*artifacts, b"", bytes(32)],
        "chunk": [*objects[:3], *(data[:100] for data in objects[:3]), *known.artifacts[:2]],
    }


def calls(
    known: Known, tokens: Sequence[str], methods: Sequence[MethodDescriptor] = METHODS
) -> st.SearchStrategy[Call]:
    """Calls of any of some methods, with any of the tokens."""
    return st.one_of([_calls_of(method, known, tokens) for method in methods])


def _calls_of(method: MethodDescriptor, known: Known, tokens: Sequence[str]) -> st.SearchStrategy[Call]:
    one = messages(method.input_type, pools_of(known, method.name)).map(lambda message: message.SerializeToString())
    sent = nearly(one).map(lambda data: (data,))
    if method.name == "Put":
        sent = _puts((*known.kept, *known.loose))
    elif method.name == "PutCalibration":
        sent = _calibrations(known.artifacts)
    several = st.lists(nearly(one), max_size=5).map(tuple)
    if method.name in _SOMETIMES_OVERSIZED:
        several = usually(several, st.just((bytes(OVERSIZED_BYTES),)), 30)
    path = f"/{method.containing_service.full_name}/{method.name}"
    return st.builds(
        Call,
        st.sampled_from([path] * 30 + [path + "s"]),
        usually(sent, several),
        st.sampled_from(tokens),
        st.sampled_from((None, None, None, None, 0, 1, 2)),
    )


@st.composite
def _puts(draw: st.DrawFn, objects: Sequence[bytes]) -> tuple[bytes, ...]:
    """Objects in chunks of any size, whole, damaged, under another's key, announced with another size."""
    steps: list[bytes] = []
    for _ in range(draw(st.integers(1, 3))):
        data = draw(st.sampled_from(objects))
        key = PageObject(draw(_mostly(data, objects[0]))).header.key
        body = draw(usually(st.just(data), nearly(st.just(data)) | st.sampled_from((data[:-1], data + b"x"))))
        size = len(body) + draw(_mostly(0, 1, -1, 2**40))
        begin = peer_pb2.PutBegin(
            namespace_digest=key.namespace_digest, page_hash=key.page_hash, object_bytes=max(0, size)
        )
        steps.append(peer_pb2.PutRequest(begin=begin).SerializeToString())
        steps += _chunks(body, draw(st.sampled_from((100, 1000, 5000, 1 << 20))), peer_pb2.PutRequest)
        steps += [peer_pb2.PutRequest(commit=True).SerializeToString()] * draw(_mostly(1, 0, 2))
    return tuple(steps)


@st.composite
def _calibrations(draw: st.DrawFn, artifacts: Sequence[bytes]) -> tuple[bytes, ...]:
    """As pages, but one."""
    data = draw(st.sampled_from(artifacts))
    digest = draw(_mostly(hashlib.sha256(data).digest(), bytes(32)))
    size = max(0, len(data) + draw(_mostly(0, 1, -1, 2**40)))
    begin = peer_pb2.PutCalibrationBegin(model_digest=bytes(32), digest=digest, size_bytes=size)
    steps = [peer_pb2.PutCalibrationRequest(begin=begin).SerializeToString()]
    steps += _chunks(data, draw(st.sampled_from((5000, 1 << 20))), peer_pb2.PutCalibrationRequest)
    steps += [peer_pb2.PutCalibrationRequest(commit=True).SerializeToString()] * draw(_mostly(1, 0, 2))
    return tuple(steps)


def _chunks(data: bytes, size: int, kind: type) -> Iterable[bytes]:
    return [kind(chunk=data[at : at + size]).SerializeToString() for at in range(0, len(data), size)]
