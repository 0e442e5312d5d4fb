"""The one-copy encoding is protobuf's."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc import wire
from sglang_kvcodec.rpc.limits import MAX_PAGES_PER_REQUEST
from sglang_kvcodec.rpc.wire import decode_fetch, decode_put, encode_chunk, encode_fragments

fragments = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**63), st.binary(max_size=300)).map(tuple), max_size=5
)


@given(fragments)
def test_protobuf_reads_our_fragments(wanted):
    response = pb.FetchResponse.FromString(encode_fragments(wanted))
    assert [(f.page_index, f.offset, f.data) for f in response.fragments] == wanted
    assert not response.headers
    assert not response.missing


@given(fragments)
def test_we_read_our_own_and_protobufs_fragments(wanted):
    expected = [FetchedFragment(*fragment) for fragment in wanted]
    assert decode_fetch(encode_fragments(wanted)) == expected
    response = pb.FetchResponse(fragments=[pb.Fragment(page_index=i, offset=o, data=d) for i, o, d in wanted])
    assert decode_fetch(response.SerializeToString()) == expected


def test_headers_and_missing_pages():
    response = pb.FetchResponse(
        headers=[pb.PageHeader(page_index=3, object_bytes=2**40, header=b"head")],
        missing=[0, 70_000],
        fragments=[pb.Fragment(page_index=3, offset=4, data=b"x")],
    )
    assert decode_fetch(response.SerializeToString()) == [
        FetchedHeader(3, 2**40, b"head"),
        FetchedMissing(0),
        FetchedMissing(70_000),
        FetchedFragment(3, 4, b"x"),
    ]


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(data):
    try:
        response = pb.FetchResponse.FromString(data)
    except DecodeError:
        with pytest.raises(FormatError):
            decode_fetch(data)
        return
    found = [event for event in decode_fetch(data) if isinstance(event, FetchedFragment)]
    assert [(f.page_index, f.offset, f.data) for f in found] == [
        (f.page_index, f.offset, f.data) for f in response.fragments
    ]


@given(fragments, st.data())
def test_a_cut_message_is_refused_or_read_as_protobuf_reads_it(wanted, data):
    encoded = encode_fragments(wanted)
    test_any_bytes_are_read_as_protobuf_reads_them_or_refused.hypothesis.inner_test(
        encoded[: data.draw(st.integers(0, len(encoded)))]
    )


@given(st.binary(max_size=300))
def test_chunks(data):
    encoded = encode_chunk(data)
    assert pb.PutRequest.FromString(encoded).chunk == data
    assert decode_put(encoded) == data
    assert decode_put(pb.PutRequest(chunk=data).SerializeToString()) == data


def test_put_steps_that_are_not_chunks():
    begin = pb.PutRequest(begin=pb.PutBegin(namespace_digest=b"n", page_hash=b"p", object_bytes=7))
    assert decode_put(begin.SerializeToString()) == begin
    assert decode_put(pb.PutRequest(commit=True).SerializeToString()) == pb.PutRequest(commit=True)
    assert decode_put(b"") == pb.PutRequest()


@given(st.binary(max_size=60))
def test_any_put_bytes_are_read_as_protobuf_reads_them_or_refused(data):
    try:
        request = pb.PutRequest.FromString(data)
    except DecodeError:
        with pytest.raises(FormatError):
            decode_put(data)
        return
    step = decode_put(data)
    assert step == (request.chunk if request.WhichOneof("step") == "chunk" else request)


@pytest.mark.parametrize("field", ["headers", "missing"])
def test_a_message_about_more_pages_than_any_request_has_is_refused(field, monkeypatch):
    """Before there is an object for each: 8 MiB could tell of eight million missing pages."""
    monkeypatch.setattr(wire, "FetchedHeader", None)
    monkeypatch.setattr(wire, "FetchedMissing", None)
    entries = {"headers": [pb.PageHeader()], "missing": [0]}[field] * (MAX_PAGES_PER_REQUEST + 1)
    with pytest.raises(FormatError, match=str(MAX_PAGES_PER_REQUEST + 1)):
        decode_fetch(pb.FetchResponse(**{field: entries}).SerializeToString())
