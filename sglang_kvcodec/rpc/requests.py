"""Checks of what a client asks for."""

from __future__ import annotations

import struct
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES, PAGE_HASH_BYTES, PageKey
from sglang_kvcodec.format.page_object import PREFIX
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import MAX_PAGES_PER_REQUEST

M = TypeVar("M", bound=Message)


def parsed(kind: type[M], data: bytes) -> M:
    """The request that ``data`` is.

    Raises:
        FormatError: it is not one.
    """
    request = kind()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise FormatError(f"not a {kind.__name__}: {error}") from error
    return request


def storage_keys(namespace_digest: bytes, page_hashes: bytes) -> list[bytes]:
    """The storage keys of the pages a request names, in its order.

    Raises:
        FormatError: digests or hashes of the wrong length, or too many.
    """
    if len(namespace_digest) != NAMESPACE_BYTES:
        raise FormatError(f"a namespace digest has {NAMESPACE_BYTES} bytes, not {len(namespace_digest)}")
    if len(page_hashes) % PAGE_HASH_BYTES:
        raise FormatError(f"{len(page_hashes)} bytes are no whole number of page hashes of {PAGE_HASH_BYTES} bytes")
    pages = len(page_hashes) // PAGE_HASH_BYTES
    if pages > MAX_PAGES_PER_REQUEST:
        raise FormatError(f"{pages} pages are more than the {MAX_PAGES_PER_REQUEST} of one request")
    # Cut in one go: a Lookup brings a thousand.
    return [namespace_digest + page_hash for page_hash in struct.unpack(f"{PAGE_HASH_BYTES}s" * pages, page_hashes)]


def announced_object(begin: pb.PutBegin) -> tuple[PageKey, int]:
    """Key and size of the object that a Put announces.

    Raises:
        FormatError: a key of the wrong length or a size no page object has.
    """
    if len(begin.namespace_digest) != NAMESPACE_BYTES or len(begin.page_hash) != PAGE_HASH_BYTES:
        raise FormatError("a page is named by a namespace digest and a page hash of 32 bytes each")
    if not PREFIX.size <= begin.object_bytes <= MAX_OBJECT_BYTES:
        raise FormatError(
            f"a page object has {PREFIX.size} to {MAX_OBJECT_BYTES} bytes, not the {begin.object_bytes} announced"
        )
    return PageKey(begin.namespace_digest, begin.page_hash), begin.object_bytes
