"""A page object on its way in. What has arrived of it may be restored while the rest is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from sglang_kvcodec.errors import ForeignPageError, KVCodecError, PeerRejectedError, TruncatedError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, read_header
from sglang_kvcodec.transform import PageTransforms

OnLanded = Callable[[KVCodecError | None], None]
"""Told once that bytes are there and checked, or why they never will be."""


class ArrivingPage(PageObject):
    """A page object that is filled from its start to its end, by one thread; any thread may read what has landed.

    The header may be read once :meth:`begin` has returned, and a layer group once it has landed. When all have, it is a
    page object like any other.
    """

    def __init__(self, key: PageKey, transforms: PageTransforms, expected_bytes: int = 0) -> None:
        """A page of which nothing has arrived.

        Args:
            key: the page that was asked for.
            transforms: what can be restored here.
            expected_bytes: its size, as far as it is known before the header comes.
        """
        self._key = key
        self._transforms = transforms
        self._expected_bytes = expected_bytes
        self._has_begun = False
        self._view = memoryview(bytearray())
        self._filled_bytes = 0
        self._position = 0
        """Of the stream that fills it: behind ``_filled_bytes`` while another peer sends the page once more."""
        self._landed = 0
        self._error: KVCodecError | None = None
        self._waiting: dict[int, list[OnLanded]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._view) if self._has_begun else self._expected_bytes

    @property
    def key(self) -> PageKey:
        """The page that was asked for."""
        return self._key

    @property
    def filled_bytes(self) -> int:
        """How much of it is there."""
        return self._filled_bytes

    def expect(self, key: PageKey, expected_bytes: int) -> None:
        """The same page in another tier will come instead; before it has begun.

        Raises:
            ValueError: it has.
        """
        if self._has_begun or key.page_hash != self._key.page_hash:
            raise ValueError(f"page {self._key} can't become {key} any more")
        self._key, self._expected_bytes = key, expected_bytes

    @property
    def has_begun(self) -> bool:
        """Whether its header is there."""
        return self._has_begun

    @property
    def header_view(self) -> memoryview:
        """The bytes of its header, once it has begun."""
        return self._data[: self.header.header_bytes]

    @property
    def is_whole(self) -> bool:
        """Whether all of it has landed."""
        return self._has_begun and self._landed == len(self.header.group_ranges)

    def begin(self, header: FetchedHeader) -> None:
        """Takes the header, checked before any memory is taken for the payload. Takes the same one again, and then what
        follows it, where the page starts anew at another peer.

        Raises:
            PeerRejectedError: another header than the first one.
            FormatError: not the header of this page.
        """
        if self._has_begun:
            if header.header != self.header_view:
                raise PeerRejectedError(f"page {self._key} comes again, coded in another way")
            self._position = self.header.header_bytes
            return
        checked = read_header(header.header)
        if checked.key != self._key:
            raise ForeignPageError(f"asked for page {self._key}, got {checked.key}")
        self._transforms.check(checked)
        if checked.object_bytes != header.object_bytes or checked.header_bytes != len(header.header):
            raise TruncatedError(
                f"page {self._key} is announced with {header.object_bytes} bytes, has {checked.object_bytes}"
            )
        self.header = checked
        # Assigning to a part of a bytearray copies twice, to a part of a view of it once.
        self._view = memoryview(bytearray(header.object_bytes))
        self._view[: len(header.header)] = header.header
        self._data = self._view.toreadonly()
        self._filled_bytes = self._position = len(header.header)
        self._has_begun = True
        self._land()

    def add(self, fragment: FetchedFragment) -> None:
        """Adds the next bytes; layer groups that they complete have landed when it returns.

        Raises:
            PeerRejectedError: bytes before the header, out of order or too many, which says nothing against what is
                stored.
            ChecksumError: a damaged page.
        """
        end = fragment.offset + len(fragment.data)
        if not self._has_begun:
            raise PeerRejectedError(f"page {self._key}: the peer sends bytes before the header")
        if fragment.offset != self._position or end > len(self._view):
            raise PeerRejectedError(f"page {self._key}: the peer sends bytes out of order")
        self._position = end
        # What has landed stays as it is: it may be read at this moment.
        if end > self._filled_bytes:
            self._view[self._filled_bytes : end] = memoryview(fragment.data)[self._filled_bytes - fragment.offset :]
            self._filled_bytes = end
            self._land()

    def _land(self) -> None:
        ranges = self.header.group_ranges
        while self._landed < len(ranges) and ranges[self._landed][1] <= self._filled_bytes:
            self._check_group(self._landed)
            with self._lock:
                waiting = self._waiting.pop(self._landed, [])
                self._landed += 1
            for on_landed in waiting:
                on_landed(None)

    def fail(self, error: KVCodecError) -> None:
        """No more will arrive; a page that is whole stays so."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            waiting = [on_landed for several in self._waiting.values() for on_landed in several]
            self._waiting.clear()
        for on_landed in waiting:
            on_landed(error)

    def when_landed(self, group_index: int, on_landed: OnLanded) -> None:
        """Has ``on_landed`` called once, now or on the thread that fills the page."""
        with self._lock:
            has_landed, error = group_index < self._landed, self._error
            if not has_landed and error is None:
                self._waiting.setdefault(group_index, []).append(on_landed)
                return
        on_landed(None if has_landed else error)


def when_all_landed(pages: Sequence[PageObject], group_index: int, on_landed: OnLanded) -> None:
    """Has ``on_landed`` called once, when the layer group of all pages has landed or one of them never will."""
    arriving = [page for page in pages if isinstance(page, ArrivingPage)]
    if not arriving:
        on_landed(None)
        return
    lock = threading.Lock()
    missing = len(arriving)

    def count(error: KVCodecError | None) -> None:
        nonlocal missing
        with lock:
            if missing == 0:
                return
            missing = 0 if error is not None else missing - 1
            is_last = missing == 0
        if is_last:
            on_landed(error)

    for page in arriving:
        page.when_landed(group_index, count)
