"""What a client makes of a peer's answers, and a peer of the chunks of a Put.

The first byte of an input says which answer the rest is. Streams are messages one after the other, each behind its u16
size.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from fuzzing.pages import golden_objects
from fuzzing.target import Target, require
from sglang_kvcodec.errors import FormatError, PeerRejectedError
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, build_page_object, header_bytes
from sglang_kvcodec.format.spec import layer_groups
from sglang_kvcodec.rpc import admin_client, admin_pb2, peer_pb2
from sglang_kvcodec.rpc.calibration_messages import CalibrationReceipt, calibration_entries, put_messages
from sglang_kvcodec.rpc.replies import FetchChecks, lookup_result, put_results
from sglang_kvcodec.rpc.wire import decode_fetch, decode_put, encode_chunk, encode_fragments

_SIZE = struct.Struct("<H")
_NAMESPACE = bytes(32)


def joined(messages: list[bytes]) -> bytes:
    """A stream as an input has it."""
    return b"".join(_SIZE.pack(len(message)) + message for message in messages)


def _split(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + _SIZE.size <= len(data):
        size = _SIZE.unpack_from(data, at)[0]
        at += _SIZE.size
        yield data[at : at + size]
        at += size


def _events_as_protobuf_has_them(message: bytes) -> list[FetchEvent] | None:
    response = peer_pb2.FetchResponse()
    try:
        response.ParseFromString(message)
    except DecodeError:
        return None
    events: list[FetchEvent] = [FetchedHeader(h.page_index, h.object_bytes, h.header) for h in response.headers]
    events += [FetchedMissing(index) for index in response.missing]
    events += [FetchedFragment(f.page_index, f.offset, f.data) for f in response.fragments]
    return events


@functools.cache
def _pages() -> tuple[bytes, ...]:
    """Two pages of one layout."""
    data = next(data for data in golden_objects() if PageObject(data).header.profile_name == "raw")
    page = PageObject(data)
    spec, key = page.header.spec, page.header.key
    groups = [{side: page.side_data(group.index, side) for side in spec.sides} for group in layer_groups(spec)]
    return data, build_page_object(PageKey(key.namespace_digest, bytes(32)), spec, "raw", groups)


def _check_fetch(data: bytes) -> bool:
    """A page that is whole is a sound object of the key that was asked for, whatever came and in which order."""
    from sglang_kvcodec.flow.receiver import Receiver
    from sglang_kvcodec.transform import PageTransforms

    asked = [PageObject(page).header for page in _pages()]
    receiver = Receiver([header.key for header in asked], PageTransforms(asked[0].spec, "raw"), 1 << 20)
    checks = FetchChecks([header.key.page_hash for header in asked])
    try:
        for message in _split(data):
            expected = _events_as_protobuf_has_them(message)
            try:
                events = decode_fetch(message)
            except FormatError:
                require(expected is None, "refused, where protobuf reads it")
                return False
            require(events == expected, "read in another way than protobuf does")
            for event in events:
                checks.check(event)
                receiver.add((0, event))
    except (FormatError, PeerRejectedError):
        return False
    whole = receiver.whole_prefix()
    for page, header in zip(whole, asked, strict=False):
        PageObject(bytes(page.header_view) + bytes(page._view[page.header.header_bytes :]), expected=header.key)
    return len(whole) == len(asked)


def _check_put(data: bytes) -> bool:
    """A chunk is what protobuf finds in the message."""
    request = peer_pb2.PutRequest()
    try:
        request.ParseFromString(data)
    except DecodeError:
        request = None
    try:
        step = decode_put(data)
    except FormatError:
        require(request is None, "refused, where protobuf reads it")
        return False
    if isinstance(step, memoryview):
        require(request is not None and bytes(step) == request.chunk, "another chunk than protobuf finds")
        return True
    require(step == request, "another step than protobuf finds")
    return True


def _check_calibration(data: bytes) -> bool:
    """What is taken for an artifact has the digest that was announced."""
    receipt = CalibrationReceipt(None, None)
    try:
        for message in _split(data):
            receipt.add(message)
        artifact = receipt.artifact()
    except FormatError:
        return False
    require(artifact_digest(artifact) in data, "an artifact that was not announced")
    return True


def _read_pages(data: bytes, *, without_data: bool) -> bool:
    try:
        messages = [admin_pb2.ReadPagesResponse.FromString(message) for message in _split(data)]
    except DecodeError:
        return False
    source = iter(messages)
    try:
        for index in range(2):
            size, content = admin_client._next_object(source, index, without_data)
            require(without_data or (size is None) == (content is None), "half an object")
            require(content is None or len(content) == size, "an object of another size than announced")
    except FormatError:
        return False
    return True


def _check_admin(data: bytes) -> bool:
    if data[:1] == b"\1":
        return _read_pages(data[1:], without_data=False)
    if data[:1] == b"\2":
        return _read_pages(data[1:], without_data=True)
    try:
        listed = admin_pb2.ListPagesResponse.FromString(data[1:])
        for page in listed.pages:
            admin_client._stored_page(page, _NAMESPACE)
    except (DecodeError, FormatError):
        return False
    return True


def _check_answers(data: bytes) -> bool:
    """Answers of one message: what they say is bounded by what was asked."""
    accepted = False
    try:
        result = lookup_result(peer_pb2.LookupResponse.FromString(data), 3)
        require(len(result.present) == 3 and result.covered_pages <= 3, f"an impossible answer: {result}")
        accepted = True
    except (DecodeError, FormatError):
        pass
    try:
        require(len(put_results(peer_pb2.PutResponse.FromString(data), 2)) == 2, "more results than objects")
        accepted = True
    except (DecodeError, FormatError):
        pass
    try:
        for entry in calibration_entries(peer_pb2.ListCalibrationsResponse.FromString(data)):
            require(len(entry.digest) == 32 and entry.size_bytes > 0, f"an impossible artifact: {entry}")
        accepted = True
    except (DecodeError, FormatError):
        pass
    return accepted


_CHECKS = (_check_fetch, _check_put, _check_calibration, _check_admin, _check_answers)


def check_wire(data: bytes) -> bool:
    """Any answer, read as a client reads it."""
    return _CHECKS[data[0] % len(_CHECKS)](data[1:]) if data else False


def _fetch_of_pages() -> list[bytes]:
    response = peer_pb2.FetchResponse()
    fragments = []
    for index, page in enumerate(_pages()):
        size = header_bytes(page)
        response.headers.add(page_index=index, object_bytes=len(page), header=page[:size])
        half = (size + len(page)) // 2
        fragments += [(index, size, page[size:half]), (index, half, page[half:])]
    return [response.SerializeToString(), *(encode_fragments([fragment]) for fragment in fragments)]


def _seeds() -> list[bytes]:
    artifact = b"any bytes are an artifact to a peer"
    digest = artifact_digest(artifact)
    begin = peer_pb2.PutBegin(namespace_digest=_NAMESPACE, page_hash=digest, object_bytes=99)
    calibration = [
        peer_pb2.GetCalibrationResponse(
            begin=peer_pb2.GetCalibrationBegin(digest=digest, size_bytes=len(artifact))
        ).SerializeToString(),
        peer_pb2.GetCalibrationResponse(chunk=artifact).SerializeToString(),
    ]
    read = [
        admin_pb2.ReadPagesResponse(begin=admin_pb2.ReadPagesBegin(page_index=0, object_bytes=5)),
        admin_pb2.ReadPagesResponse(chunk=b"bytes"),
        admin_pb2.ReadPagesResponse(begin=admin_pb2.ReadPagesBegin(page_index=1, is_missing=True)),
    ]
    listed = admin_pb2.ListPagesResponse()
    listed.pages.add(namespace_digest=_NAMESPACE, page_hash=digest, object_bytes=7, stored_at_ms=1)
    lookup = peer_pb2.LookupResponse(covered_pages=2, present=b"\1\1\0", covered_bytes=9)
    results = peer_pb2.PutResponse()
    results.results.add(outcome=peer_pb2.PUT_OUTCOME_STORED)
    results.results.add(outcome=peer_pb2.PUT_OUTCOME_REJECTED, detail="damaged")
    entries = peer_pb2.ListCalibrationsResponse()
    entries.calibrations.add(model_digest=digest, digest=digest, size_bytes=7, stored_at_ms=1, is_current=True)
    return [
        bytes([0]) + joined(_fetch_of_pages()),
        bytes([0]) + joined([peer_pb2.FetchResponse(missing=[0]).SerializeToString()]),
        bytes([1]) + encode_chunk(b"a chunk"),
        bytes([1]) + peer_pb2.PutRequest(begin=begin).SerializeToString(),
        bytes([1]) + peer_pb2.PutRequest(commit=True).SerializeToString(),
        bytes([2]) + joined(calibration),
        bytes([2]) + joined(list(put_messages(digest, digest, artifact, None))),
        bytes([3, 0]) + listed.SerializeToString(),
        bytes([3, 1]) + joined([message.SerializeToString() for message in read]),
        bytes([3, 2]) + joined([message.SerializeToString() for message in read[::2]]),
        *(bytes([4]) + message.SerializeToString() for message in (lookup, results, entries)),
    ]


TARGET = Target(
    "wire",
    "a peer's answers as a client reads them, the chunks of a Put as a peer does",
    check_wire,
    _seeds,
)
