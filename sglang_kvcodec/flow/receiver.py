"""What a fetch brings, event by event, made into pages."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import ArrivalError, FormatError
from sglang_kvcodec.flow.arriving_page import ArrivingPage
from sglang_kvcodec.flow.planner import CUT_TO_HOST_MEMORY
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

UNKNOWN_TIER = "unknown"
"""Of bytes that are counted before a header has said what they are of."""


def bytes_of(event: FetchedHeader | FetchedFragment) -> int:
    """Of a page object that an event brings."""
    return len(event.header) if isinstance(event, FetchedHeader) else len(event.data)


class Receiver:
    """Turns the events of one fetch into pages; a bad page ends the prefix there."""

    def __init__(
        self, keys: Sequence[PageKey], transforms: PageTransforms, max_bytes: int, expected_bytes: Sequence[int] = ()
    ) -> None:
        """Waits for pages.

        Args:
            keys: of the pages, in prefix order.
            transforms: what can be restored here.
            max_bytes: of all pages together.
            expected_bytes: of each page; none where that is not known.
        """
        sizes = expected_bytes or [0] * len(keys)
        self.pages = [ArrivingPage(key, transforms, size) for key, size in zip(keys, sizes, strict=True)]
        """All of them, in prefix order, whatever has arrived of each."""
        self._transforms = transforms
        self._is_promised = False
        self._usable = len(keys)
        self._free_bytes = max_bytes
        self._whole = 0
        self.received_bytes = 0
        self.damaged: list[PageKey] = []
        self.gone: list[PageKey] = []
        self.failure = ""

    @property
    def is_complete(self) -> bool:
        """Whether nothing of use can come any more."""
        return self.whole_pages >= self._usable

    @property
    def whole_pages(self) -> int:
        """Length of :meth:`whole_prefix`."""
        while self._whole < self._usable and self.pages[self._whole].is_whole:
            self._whole += 1
        return min(self._whole, self._usable)

    def add(self, placed: tuple[int, FetchEvent]) -> None:
        """Takes an event, and the index of the first page of the fetch that it is of."""
        first, event = placed
        index = first + event.page_index
        if not isinstance(event, FetchedMissing):
            self.received_bytes += bytes_of(event)
        if index >= self._usable or self.pages[index].is_whole:
            return
        page = self.pages[index]
        if isinstance(event, FetchedMissing):
            self.gone.append(page.key)
            self._cut(index, "gone")
            return
        try:
            if isinstance(event, FetchedFragment):
                page.add(event)
                return
            if page.has_begun:
                page = self._begin_again(index, event)
            elif event.object_bytes > self._free_bytes:
                self._cut(index, CUT_TO_HOST_MEMORY)
                return
            else:
                self._free_bytes -= event.object_bytes
            page.begin(event)
        except FormatError as error:
            logger.warning("kvcodec: stored page %s can't be used: %s", page.key, error)
            self.damaged.append(page.key)
            self._cut(index, error.reason)
        finally:
            # Last: a page says itself what tier it is of, and a fetch may go on in another one.
            tier = page.header.profile_name if page.has_begun else UNKNOWN_TIER
            metrics.FETCHED_BYTES.labels(tier=tier).inc(bytes_of(event))

    def promise(self) -> list[ArrivingPage]:
        """All pages, whatever has arrived of each, for who will wait for the rest."""
        self._is_promised = True
        return list(self.pages)

    def expect(self, first: int, keys: Sequence[PageKey], expected_bytes: Sequence[int]) -> None:
        """From now on other objects come for the pages from ``first`` on, of which none is whole.

        Args:
            first: index of the first.
            keys: of all pages from there on.
            expected_bytes: of each.
        """
        for index, (key, size) in enumerate(zip(keys, expected_bytes, strict=True), first):
            page = self.pages[index]
            if page.has_begun:
                # What has arrived of it is of no use. Nobody waits for it: it was not promised.
                self._free_bytes += len(page)
                self.received_bytes -= page.filled_bytes
                self.pages[index] = ArrivingPage(key, self._transforms, size)
            else:
                page.expect(key, size)

    def _begin_again(self, index: int, header: FetchedHeader) -> ArrivingPage:
        """The page, whose header comes again, from another peer that may keep other bytes under its key."""
        page = self.pages[index]
        if not self._is_promised and header.header != page.header_view:
            self._free_bytes += len(page) - header.object_bytes
            page = self.pages[index] = ArrivingPage(page.key, self._transforms)
        return page

    def _cut(self, index: int, reason: str) -> None:
        """Pages from ``index`` on are of no use."""
        self._usable = index
        self.failure = reason
        self._fail_from(index, reason)

    def end(self, reason: str) -> None:
        """Nothing more will come: whoever waits for what is missing is told so."""
        self._fail_from(self.whole_pages, reason)

    def _fail_from(self, index: int, reason: str) -> None:
        for page in self.pages[index:]:
            page.fail(ArrivalError(f"page {page.key} does not arrive: {reason}"))

    def whole_prefix(self) -> list[ArrivingPage]:
        """The pages from the first on, up to the first that is not whole."""
        return self.pages[: self.whole_pages]
