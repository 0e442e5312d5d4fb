"""Puts fetched fragments together into checked page objects."""

from __future__ import annotations

from sglang_kvcodec.errors import ForeignPageError, PeerRejectedError, TruncatedError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, read_header
from sglang_kvcodec.transform import PageTransforms


class PageAssembly:
    """One page object on its way in."""

    def __init__(self, key: PageKey, transforms: PageTransforms, header: FetchedHeader) -> None:
        """Checks the header before any memory is taken for the payload.

        Args:
            key: the page that was asked for.
            transforms: what can be restored here.
            header: the first event of the page.

        Raises:
            FormatError: not the header of that page.
        """
        checked = read_header(header.header)
        if checked.key != key:
            raise ForeignPageError(f"asked for page {key}, got {checked.key}")
        transforms.check(checked)
        if checked.object_bytes != header.object_bytes or checked.header_bytes != len(header.header):
            raise TruncatedError(
                f"page {key} is announced with {header.object_bytes} bytes, has {checked.object_bytes}"
            )
        self._key = key
        self._data = bytearray(header.object_bytes)
        # Assigning to a part of a bytearray copies twice, to a part of a view of it once.
        self._view = memoryview(self._data)
        self._view[: len(header.header)] = header.header
        self._filled_bytes = len(header.header)

    def add(self, fragment: FetchedFragment) -> PageObject | None:
        """Adds the next bytes; the page once it is complete and checked.

        Raises:
            PeerRejectedError: bytes out of order or too many, which says nothing against what is stored.
            FormatError: a damaged page.
        """
        end = fragment.offset + len(fragment.data)
        if fragment.offset != self._filled_bytes or end > len(self._data):
            raise PeerRejectedError(f"page {self._key}: the peer sends bytes out of order")
        self._view[fragment.offset : end] = fragment.data
        self._filled_bytes = end
        return self.finish()

    def finish(self) -> PageObject | None:
        """The page if all of it has arrived."""
        if self._filled_bytes < len(self._data):
            return None
        return PageObject(self._data, expected=self._key)
