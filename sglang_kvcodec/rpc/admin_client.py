"""What an operator asks of one storage peer, over the connection of its client."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message

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
        self._peer = peer
        self._silence_s = silence_s
        self._watch = CallWatch()

    def close(self) -> None:
        """Ends the thread that watches calls."""
        self._watch.close()

    def namespaces(self, timeout_s: float = 3600.0) -> list[NamespaceUse]:
        """What each namespace takes. The peer walks over all keys for it."""
        with self._translated("ListNamespaces"):
            response = self._ask("ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse, timeout_s)
            return [NamespaceUse(use.namespace_digest, use.objects, use.stored_bytes) for use in response.namespaces]

    def pages(self, namespace_digest: bytes = b"") -> Iterator[StoredPage]:
        """The pages of a namespace, or of all, in no order, as they arrive; holds one message of them."""
        request = pb.ListPagesRequest(namespace_digest=namespace_digest)
        for message in self._messages("ListPages", request, pb.ListPagesResponse):
            with self._translated("ListPages"):
                pages = [_stored_page(page, namespace_digest) for page in message.pages]
            yield from pages

    def object_bytes(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> list[int | None]:
        """The size of each page's object, None where there is none."""
        request = pb.StatPagesRequest(namespace_digest=namespace_digest, page_hashes=b"".join(page_hashes))
        with self._translated("StatPages"):
            sizes = self._ask("StatPages", request, pb.StatPagesResponse, self._silence_s).object_bytes
            if len(sizes) != len(page_hashes):
                raise FormatError(f"{len(sizes)} sizes for {len(page_hashes)} pages")
            return [size or None for size in sizes]

    def read(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> Iterator[bytes | None]:
        """The object of each page in order, None where it has gone. The bytes are not checked."""
        for _, data in self._objects(namespace_digest, page_hashes, without_data=False):
            yield data

    def warm(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> Iterator[int | None]:
        """Has the peer read pages; the size in bytes of each in order, None where it has gone."""
        for size_bytes, _ in self._objects(namespace_digest, page_hashes, without_data=True):
            yield size_bytes

    def _objects(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], *, without_data: bool
    ) -> Iterator[tuple[int | None, bytes | None]]:
        """Size and bytes of each page's object in order; the bytes are None if they were not asked for."""
        request = pb.ReadPagesRequest(
            namespace_digest=namespace_digest, page_hashes=b"".join(page_hashes), without_data=without_data
        )
        messages = self._messages("ReadPages", request, pb.ReadPagesResponse)
        try:
            for index in range(len(page_hashes)):
                with self._translated("ReadPages"):
                    found = _next_object(messages, index, without_data)
                yield found
        finally:
            messages.close()

    def _ask(self, rpc: str, request: Message, answer: type[Message], timeout_s: float) -> Any:
        """The answer to a request. The peer's connection is asked for each time: it may be another one."""
        ask = self._peer.channel.unary_unary(f"/{SERVICE}/{rpc}", _serialized, answer.FromString)
        return ask(request, timeout=timeout_s, metadata=self._peer.call_metadata)

    def _messages(self, rpc: str, request: Message, answer: type[Message]) -> Generator[Any, None, None]:
        """The messages of a response stream under watch; the call begins and ends with the iterator."""
        ask = self._peer.channel.unary_stream(f"/{SERVICE}/{rpc}", _serialized, answer.FromString)
        call = ask(request, metadata=self._peer.call_metadata)
        watched = WatchedCall(call, self._silence_s, None)
        self._watch.add(watched)
        try:
            while True:
                watched.waiting()
                with self._translated(rpc, watched):
                    message = next(call, None)
                watched.heard()
                if message is None:
                    return
                yield message
        finally:
            self._watch.remove(watched)
            call.cancel()

    @contextlib.contextmanager
    def _translated(self, rpc: str, watched: WatchedCall | None = None) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            if watched is not None and watched.verdict is not None:
                raise PeerTimeoutError(f"{rpc} at {self._address}: silent for {self._silence_s} s") from None
            raise peer_error(error.code(), error.details(), rpc, self._address) from error
        except FormatError as error:
            raise PeerRejectedError(f"{rpc} at {self._address}: a senseless answer: {error}") from error


def _serialized(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _stored_page(page: pb.ListedPage, namespace_digest: bytes) -> StoredPage:
    try:
        key = PageKey(page.namespace_digest, page.page_hash)
    except ValueError as error:
        raise FormatError(str(error)) from None
    if namespace_digest not in (b"", key.namespace_digest):
        raise FormatError("a page of another namespace")
    return StoredPage(key, page.object_bytes, page.stored_at_ms)


def _next_object(messages: Iterator[Any], index: int, without_data: bool) -> tuple[int | None, bytes | None]:
    """The next object of a ReadPages.

    Raises:
        FormatError: the messages make no sense, or end.
    """
    message = next(messages, None)
    if message is None or message.WhichOneof("step") != "begin" or message.begin.page_index != index:
        raise FormatError(f"page {index} was to follow")
    begin = message.begin
    if begin.is_missing:
        return None, None
    if begin.object_bytes > MAX_OBJECT_BYTES:
        raise FormatError(f"an object of {begin.object_bytes} bytes")
    if without_data:
        return begin.object_bytes, None
    data = bytearray()
    while len(data) < begin.object_bytes:
        message = next(messages, None)
        if message is None or message.WhichOneof("step") != "chunk" or not message.chunk:
            raise FormatError(f"{len(data)} of {begin.object_bytes} bytes of page {index}")
        data += message.chunk
    if len(data) != begin.object_bytes:
        raise FormatError(f"page {index}: more than the announced {begin.object_bytes} bytes")
    return begin.object_bytes, bytes(data)
