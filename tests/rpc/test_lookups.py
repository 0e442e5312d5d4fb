"""What a Lookup answers is what the words of ``protos/`` say, whatever is stored and whatever is missing."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.exchange import LookupResult
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.lookups import found_pages
from sglang_kvcodec.rpc.replies import lookup_result
from sglang_kvcodec.rpc.requests import storage_keys
from sglang_kvcodec.rpc.tenants import TenantEngine
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine

NAMESPACE = bytes(range(32))
HASHES = [bytes([number]) * 32 for number in range(12)]


def asked(sizes):
    """The answer by its definition: one page after the other, up to the first that is missing."""
    covered_pages, covered_bytes = 0, 0
    for size in sizes:
        if size is None:
            break
        covered_pages, covered_bytes = covered_pages + 1, covered_bytes + size
    return LookupResult(covered_pages, tuple(size is not None for size in sizes), covered_bytes)


@given(st.lists(st.none() | st.integers(0, 1 << 40)))
def test_any_sizes(sizes):
    response = pb.LookupResponse.FromString(found_pages(sizes).SerializeToString())
    assert lookup_result(response, len(sizes)) == asked(sizes)


@given(pages=st.integers(0, 4), covered=st.integers(0, 5), present=st.lists(st.integers(0, 2), max_size=5).map(bytes))
def test_any_answer_is_taken_only_if_it_agrees_with_itself(pages, covered, present):
    response = pb.LookupResponse(covered_pages=covered, present=present, covered_bytes=7)
    stored = tuple(byte == 1 for byte in present)
    if len(present) == pages and covered == asked([1 if here else None for here in stored]).covered_pages:
        assert lookup_result(response, pages) == LookupResult(covered, stored, 7)
    else:
        with pytest.raises(FormatError):
            lookup_result(response, pages)


_some_pages = st.lists(st.integers(0, len(HASHES) - 1), unique=True)
_steps = st.lists(st.tuples(st.sampled_from(["put", "delete", "other tenant puts"]), _some_pages), max_size=5)


@given(steps=_steps, lookups=st.lists(st.lists(st.integers(0, len(HASHES) - 1)), max_size=4), room=st.integers(1, 12))
def test_any_store(tmp_path_factory, steps, lookups, room):
    """Holes, evictions, what other tenants have, pages asked for twice: as if each were asked for alone."""
    directory = tmp_path_factory.mktemp("store")
    with contextlib.closing(LmdbEngine(directory, 100 * room)) as store:
        one, other = (TenantEngine(store, name, b"secret") for name in ("one", "other"))
        for step, numbers in steps:
            for number in numbers:
                if step == "delete":
                    one.delete(NAMESPACE + HASHES[number])
                else:
                    (one if step == "put" else other).put(NAMESPACE + HASHES[number], bytes(100 - number))
        for numbers in lookups:
            keys = storage_keys(NAMESPACE, b"".join(HASHES[number] for number in numbers))
            assert keys == [NAMESPACE + HASHES[number] for number in numbers]
            alone = [one.peek([key])[0] for key in keys]
            sizes = one.sizes(keys)
            assert sizes == [None if found is None else found.size_bytes for found in alone]
            assert lookup_result(found_pages(sizes), len(keys)) == asked(sizes)
