"""Makes pages of what a peer sends: keeps the good ones in host memory, and has the peer drop the damaged ones."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.receiver import Receiver
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms


class Arrivals:
    """What all fetches do with what arrives. Thread-safe."""

    def __init__(
        self,
        peer: PeerTransport,
        monitor: PeerMonitor,
        cache: BitstreamCache,
        stored: StoredPages,
        transforms: PageTransforms,
        max_bytes: int,
    ) -> None:
        """Nothing has arrived.

        Args:
            peer: where pages come from.
            monitor: told if it fails.
            cache: where they stay.
            stored: told what the peer has not.
            transforms: what can be restored here; says which pages are taken.
            max_bytes: of the pages of one fetch together.
        """
        self._peer = peer
        self._monitor = monitor
        self._cache = cache
        self._stored = stored
        self._transforms = transforms
        self._max_bytes = max_bytes

    def receiver(self, keys: Sequence[PageKey], page_bytes: Sequence[int]) -> Receiver:
        """Waits for pages, in prefix order, of these sizes."""
        return Receiver(keys, self._transforms, self._max_bytes, page_bytes)

    def receiver_along(self, course: Course, wanted: Sequence[bytes]) -> Receiver:
        """Waits for the pages of a course; ``wanted`` are their hashes."""
        keys = [PageKey(*place) for place in zip(course.namespaces, wanted, strict=True)]
        return self.receiver(keys, course.page_bytes)

    def keep(self, receiver: Receiver, wanted: Sequence[bytes], pages: Sequence[PageObject]) -> list[PageKey]:
        """Keeps what is good and remembers what is not.

        Args:
            receiver: of a fetch that has ended.
            wanted: hashes of all its pages.
            pages: those of them from the first on that are whole.

        Returns:
            The keys of pages that came and can't be read.
        """
        for page_hash, page in reversed(list(zip(wanted, pages, strict=False))):
            self._cache.put(page_hash, page)
        for key in receiver.gone:
            self._stored.update(key.namespace_digest, [key.page_hash], [False])
        return receiver.damaged

    def drop_damaged(self, keys: Sequence[PageKey]) -> None:
        """A page that can't be read stands in the way of a good copy of it: the peer keeps what it has."""
        for key in keys:
            self._stored.update(key.namespace_digest, [key.page_hash], [False])
            try:
                self._peer.delete(key.namespace_digest, [key.page_hash])
            except PeerError as error:
                self._monitor.failed("delete", error)
