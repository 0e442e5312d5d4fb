"""Bulk bytes in protobuf's encoding, copied once to be written and not at all to be read.

Only the two messages that carry payload are written and read here, and only in the plain shape that peer and client
give them; anything else is left to protobuf. The bytes are those of ``protos/``: any gRPC client understands them.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import MAX_PAGES_PER_REQUEST

_VARINT, _LEN = 0, 2
_FRAGMENTS_TAG = pb.FetchResponse.FRAGMENTS_FIELD_NUMBER << 3 | _LEN
_PAGE_INDEX_TAG = pb.Fragment.PAGE_INDEX_FIELD_NUMBER << 3 | _VARINT
_OFFSET_TAG = pb.Fragment.OFFSET_FIELD_NUMBER << 3 | _VARINT
_DATA_TAG = pb.Fragment.DATA_FIELD_NUMBER << 3 | _LEN
_CHUNK_TAG = pb.PutRequest.CHUNK_FIELD_NUMBER << 3 | _LEN
_MAX_VARINT_BYTES = 10


_ONE_BYTE_VARINTS = tuple(bytes((value,)) for value in range(0x80))


def _varint(value: int) -> bytes:
    # Without a loop for what there are several of in every fragment.
    if value < 1 << 7:
        return _ONE_BYTE_VARINTS[value]
    if value < 1 << 14:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 1 << 21:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: Buffer, position: int) -> tuple[int, int]:
    """Value and the position behind it; IndexError at the end of ``data``."""
    first = data[position]
    if first < 0x80:
        return first, position + 1
    second = data[position + 1]
    if second < 0x80:
        return first & 0x7F | second << 7, position + 2
    value, shift = first & 0x7F | (second & 0x7F) << 7, 14
    position += 2
    for _ in range(_MAX_VARINT_BYTES - 2):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise IndexError


def encode_fragments(fragments: Iterable[tuple[int, int, Buffer]]) -> bytes:
    """A serialized ``FetchResponse`` of ``(page_index, offset, data)`` fragments."""
    pieces: list[Buffer] = []
    for page_index, offset, data in fragments:
        head = b"%c%b%c%b%c%b" % (
            _PAGE_INDEX_TAG,
            _varint(page_index),
            _OFFSET_TAG,
            _varint(offset),
            _DATA_TAG,
            _varint(len(data)),
        )
        pieces += (b"%c%b" % (_FRAGMENTS_TAG, _varint(len(head) + len(data))), head, data)
    return b"".join(pieces)


def decode_fetch(data: bytes) -> list[FetchEvent]:
    """The events of a serialized ``FetchResponse``, unchecked against what was asked for.

    Raises:
        FormatError: not such a message.
    """
    try:
        return list(_plain_fragments(data))
    except IndexError:
        pass
    response = pb.FetchResponse()
    try:
        response.ParseFromString(data)
    except DecodeError as error:
        raise FormatError(f"not a Fetch message: {error}") from error
    if len(response.headers) > MAX_PAGES_PER_REQUEST or len(response.missing) > MAX_PAGES_PER_REQUEST:
        # Before there is an object for each: a byte or two of the message would become a hundred.
        raise FormatError(f"{len(response.headers)} headers, {len(response.missing)} missing pages in a Fetch message")
    events: list[FetchEvent] = [FetchedHeader(h.page_index, h.object_bytes, h.header) for h in response.headers]
    events += [FetchedMissing(page_index) for page_index in response.missing]
    events += [FetchedFragment(f.page_index, f.offset, f.data) for f in response.fragments]
    return events


def _plain_fragments(data: bytes) -> list[FetchedFragment]:
    """The fragments of a message as :func:`encode_fragments` writes it; IndexError for any other."""
    fragments = []
    position = 0
    view = memoryview(data)
    while position < len(data):
        position = _expect(data, position, _FRAGMENTS_TAG)
        fragment_bytes, position = _read_varint(data, position)
        stop = position + fragment_bytes
        page_index, position = _read_varint(data, _expect(data, position, _PAGE_INDEX_TAG))
        offset, position = _read_varint(data, _expect(data, position, _OFFSET_TAG))
        data_bytes, position = _read_varint(data, _expect(data, position, _DATA_TAG))
        if position + data_bytes != stop or stop > len(data) or page_index >> 32 or offset >> 64:
            raise IndexError
        fragments.append(FetchedFragment(page_index, offset, view[position:stop]))
        position = stop
    return fragments


def _expect(data: bytes, position: int, tag: int) -> int:
    if data[position] != tag:
        raise IndexError
    return position + 1


def encode_chunk(data: Buffer) -> bytes:
    """A serialized ``PutRequest`` with a chunk."""
    return b"".join((b"%c%b" % (_CHUNK_TAG, _varint(len(data))), data))


def decode_put(data: bytes) -> pb.PutRequest | memoryview:
    """A serialized ``PutRequest``; a chunk as a view of ``data``.

    Raises:
        FormatError: not such a message.
    """
    if data[:1] == bytes((_CHUNK_TAG,)):
        try:
            chunk_bytes, position = _read_varint(data, 1)
        except IndexError:
            raise FormatError("not a Put message: a chunk is cut") from None
        if position + chunk_bytes == len(data):
            return memoryview(data)[position:]
    request = pb.PutRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise FormatError(f"not a Put message: {error}") from error
    return memoryview(request.chunk) if request.WhichOneof("step") == "chunk" else request
