"""What an operator asks of one storage peer, over the connection of its client."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grpc

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import FormatError, PeerRejectedError, PeerTimeoutError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.rpc import admin_pb2 as pb
from sglang_kvcodec.rpc.admin import SERVICE
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.errors import peer_error
from sglang_kvcodec.rpc.watch import CallWatch, WatchedCall


class NamespaceUse(NamedTuple):
    """What a namespace takes in a store."""

    namespace_digest: bytes
    objects: int
    stored_bytes: int


class StoredPage(NamedTuple):
    """A page that is stored.

    ``stored_at_ms`` is when it was put, in milliseconds of Unix time.
    """

    key: PageKey
    object_bytes: int
    stored_at_ms: int


class PeerAdmin:
    """Calls the service ``Admin`` of a peer; every method raises what ``PeerTransport``'s do."""

    def __init__(self, peer: GrpcPeer, silence_s: float = 60.0) -> None:
        """Uses the connection of ``peer``, which stays the caller's to close, after :meth:`close`.

        Args:
            peer: client of the peer.
            silence_s: longest silence of the peer inside a call.
        """
        self._address = peer.address
        self._silence_s = silence_s
        self._watch = CallWatch()
        channel = peer.channel
        self._list_namespaces = channel.unary_stream  # replaced below; keeps the attributes together
        self._list_namespaces = channel.unary_unary(
            f"/{SERVICE}/ListNamespaces",
            pb.ListNamespacesRequest.SerializeToString,
            pb.ListNamespacesResponse.FromString,
        )
        self._stat_pages = channel.unary_unary(
            f"/{SERVICE}/StatPages", pb.StatPagesRequest.SerializeToString, pb.StatPagesResponse.FromString
        )
        self._list_pages = channel.unary_stream(
            f"/{SERVICE}/ListPages", pb.ListPagesRequest.SerializeToString, pb.ListPagesResponse.FromString
        )
        self._read_pages = channel.unary_stream(
            f"/{SERVICE}/ReadPages", pb.ReadPagesRequest.SerializeToString, pb.ReadPagesResponse.FromString
        )

    def close(self) -> None:
        """Ends the thread that watches calls."""
        self._watch.close()

    def namespaces(self, timeout_s: float = 3600.0) -> list[NamespaceUse]:
        """What each namespace takes. The peer walks over all keys for it."""
        with self._translated("ListNamespaces"):
            response = self._list_namespaces(pb.ListNamespacesRequest(), timeout=timeout_s)
            return [NamespaceUse(use.namespace_digest, use.objects, use.stored_bytes) for use in response.namespaces]

    def pages(self, namespace_digest: bytes = b"") -> Iterator[StoredPage]:
        """The pages of a namespace, or of all, in no order, as they arrive; holds one message of them."""
        request = pb.ListPagesRequest(namespace_digest=namespace_digest)
        for message in self._messages("ListPages", self._list_pages(request)):
            with self._translated("ListPages"):
                pages = [_stored_page(page, namespace_digest) for page in message.pages]
            yield from pages

    def object_bytes(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> list[int | None]:
        """The size of each page's object, None where there is none."""
        request = pb.StatPagesRequest(namespace_digest=namespace_digest, page_hashes=b"".join(page_hashes))
        with self._translated("StatPages"):
            sizes = self._stat_pages(request, timeout=self._silence_s).object_bytes
            if len(sizes) != len(page_hashes):
                raise FormatError(f"{len(sizes)} sizes for {len(page_hashes)} pages")
            return [size or None for size in sizes]

    def read(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> Iterator[tuple[int, bytes | None]]:
        """Index and object of each page in order, None where it has gone. The bytes are not checked."""
        incoming: bytearray | None = None
        for index, begin, chunk in self._steps(namespace_digest, page_hashes, without_data=False):
            if begin is not None:
                incoming = None if begin.is_missing else bytearray()
                if incoming is None:
                    yield index, None
                    continue
            assert incoming is not None
            incoming += chunk
            if len(incoming) == self._expected_bytes:
                yield index, bytes(incoming)

    def warm(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> Iterator[tuple[int, int | None]]:
        """Has the peer read pages; index and size in bytes of each in order, None where it has gone."""
