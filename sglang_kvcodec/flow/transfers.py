"""One Fetch after another, measured and traced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.pacing import PROGRESS, Flight
from sglang_kvcodec.flow.receiver import bytes_of
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.exchange import FetchedMissing, FetchEvent, PeerTransport


class Transfers:
    """From one peer."""

    def __init__(self, peer: PeerTransport, link: LinkMeter, tracer: Tracer) -> None:
        """None yet."""
        self._peer = peer
        self._link = link
        self._tracer = tracer

    def events(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], stop: threading.Event, rid: str
    ) -> Generator[FetchEvent, None, None]:
        """The events of the Fetch of some pages.

        Args:
            namespace_digest: of all of them.
            page_hashes: which.
            stop: ends it.
            rid: of the request, for the trace.

        Raises:
            PeerError: the peer fails.
        """
        transfer = self._link.transfer()
        start_s, received_bytes = time.monotonic(), 0
        events = self._peer.fetch(namespace_digest, page_hashes, stop)
        try:
            for event in events:
                if not isinstance(event, FetchedMissing):
                    transfer.received(bytes_of(event))
                    received_bytes += bytes_of(event)
                yield event
        finally:
            events.close()
            transfer.end()
            self._tracer.span(rid, "wire", start_s, time.monotonic(), bytes=received_bytes, pages=len(page_hashes))
            self._tracer.counter("link", bytes_per_s=self._link.bytes_per_s() or 0.0)

    def along(
        self,
        course: Course,
        wanted: Sequence[bytes],
        stop: threading.Event,
        flight: Flight | None = None,
        rid: str = "explorations",
        before_block: Callable[[int], None] = lambda first: None,
    ) -> Iterator[tuple[int, FetchEvent]]:
        """The events of fetches of one block of pages after another, each with the index of its block's first page.

        A block takes ``BLOCK_S`` at most: as a peer sends layer group after layer group, a transfer that ends early
        leaves whole pages of the blocks before only. The last one is larger.
        Where the course is switched, the next block begins at once, and the stream that was under way ends.

        Args:
            course: where the pages come from.
            wanted: their hashes.
            stop: ends it.
            flight: told when the first of them arrives.
            rid: of the request, for the trace.
            before_block: called with the index of the first page of each block.

        Raises:
            PeerError: the peer fails.
        """
        first = 0
        while first < len(wanted) and not stop.is_set():
            before_block(first)
            course.take_restart()
            link = self._link
            pages = course.block(first, link.bytes_per_s(), SEGMENT_PAGES, link.round_trip_s)
            block = wanted[first : first + pages]
            restart: int | None = None
            events = self.events(course.namespaces[first], block, stop, rid)
            try:
                for event in events:
                    if flight is not None and flight.phase != PROGRESS and not isinstance(event, FetchedMissing):
                        flight.begin(PROGRESS, time.monotonic())
                    yield first, event
                    if (restart := course.take_restart()) is not None:
                        break
            finally:
                events.close()
            first = first + len(block) if restart is None else restart
