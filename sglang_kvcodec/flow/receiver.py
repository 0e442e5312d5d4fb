"""What a fetch brings, event by event, made into pages."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import FormatError, PeerRejectedError
from sglang_kvcodec.flow.assembly import PageAssembly
from sglang_kvcodec.flow.planner import CUT_TO_HOST_MEMORY
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)


def bytes_of(event: FetchedHeader | FetchedFragment) -> int:
    """Of a page object that an event brings."""
    return len(event.header) if isinstance(event, FetchedHeader) else len(event.data)


class Receiver:
    """Turns the events of one fetch into pages; a bad page ends the prefix there."""

    def __init__(self, keys: Sequence[PageKey], transforms: PageTransforms, max_bytes: int) -> None:
        self._keys = keys
        self._transforms = transforms
        self._assemblies: dict[int, PageAssembly] = {}
        self._pages: dict[int, PageObject] = {}
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
        return len(self._pages) >= self._usable

    @property
    def whole_pages(self) -> int:
        """Length of :meth:`whole_prefix`."""
        while self._whole in self._pages:
            self._whole += 1
        return min(self._whole, self._usable)

    def add(self, placed: tuple[int, FetchEvent]) -> None:
        """Takes an event, and the index of the first page of the fetch that it is of."""
        first, event = placed
        index = first + event.page_index
        if not isinstance(event, FetchedMissing):
            self.received_bytes += bytes_of(event)
        if index >= self._usable or index in self._pages:
            return
        if isinstance(event, FetchedMissing):
            self.gone.append(self._keys[index])
            self._cut(index, "gone")
            return
        try:
            if isinstance(event, FetchedHeader):
                metrics.FETCHED_BYTES.inc(len(event.header))
                if event.object_bytes > self._free_bytes:
                    self._cut(index, CUT_TO_HOST_MEMORY)
                    return
                self._free_bytes -= event.object_bytes
                self._assemblies[index] = PageAssembly(self._keys[index], self._transforms, event)
                page = self._assemblies[index].finish()
            else:
                metrics.FETCHED_BYTES.inc(len(event.data))
                assembly = self._assemblies.get(index)
                if assembly is None:
                    raise PeerRejectedError(f"page {self._keys[index]}: the peer sends bytes before the header")
                page = assembly.add(event)
        except FormatError as error:
            logger.warning("kvcodec: stored page %s can't be used: %s", self._keys[index], error)
            self.damaged.append(self._keys[index])
            self._cut(index, error.reason)
            return
        if page is not None:
            self._pages[index] = page
            del self._assemblies[index]

    def _cut(self, index: int, reason: str) -> None:
        """Pages from ``index`` on are of no use."""
        self._usable = index
        self.failure = reason
        for i in [i for i in self._assemblies if i >= index]:
            del self._assemblies[i]
        for i in [i for i in self._pages if i >= index]:
            del self._pages[i]

    def whole_prefix(self) -> list[PageObject]:
        """The pages from the first on, up to the first that is not whole."""
        pages: list[PageObject] = []
        while len(pages) in self._pages:
            pages.append(self._pages[len(pages)])
        return pages
