"""What a Fetch sends: page headers, then payload layer group by layer group. Blocking; for a pool of threads.

Nothing is held but where each layer group lies: every message reads its own slices from the engine, so a stream takes
the memory of a few messages, however many pages it carries.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import ForeignPageError, FormatError, TruncatedError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES, PageKey
from sglang_kvcodec.format.page_object import PREFIX, PageHeader, header_bytes, read_header
from sglang_kvcodec.rpc.wire import encode_fragments
from sglang_kvcodec.storage.base import RangeReader, StorageEngine

logger = logging.getLogger(__name__)

AT_HAND_S = 1.0
"""What was read within that time is taken to be in memory still, see ``StorageEngine.ranges_now``."""
_FIRST_READ_BYTES = 4096
"""Holds most headers whole."""


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Where the layer groups of a stored object lie, as ``(start, stop)`` in bytes."""

    object_bytes: int
    group_ranges: tuple[tuple[int, int], ...]


class Slice(NamedTuple):
    """Bytes ``[start, stop)`` of the object of the request's page ``page_index``."""

    page_index: int
    start: int
    stop: int


@functools.lru_cache(maxsize=8192)
def _header_of(header: bytes) -> PageHeader:
    # Named by its own bytes: a popular prefix is parsed once, and a changed byte is parsed anew.
    return read_header(header)


def read_page(
    engine: StorageEngine, key: bytes, object_bytes: int, has_tenants: bool = False
) -> tuple[bytes, PageLayout] | None:
    """Header and layout of a stored object; None if it is not stored, or can't be read and was therefore deleted.

    Args:
        engine: where it is.
        key: its storage key.
        object_bytes: its size there.
        has_tenants: whether an object of another namespace may be a tenant's, asked for by who knows its storage key
            and is not of the tenant: then it is sound, and stays.

    Raises:
        StorageError: the engine failed.
    """
    start = engine.get_range(key, 0, _FIRST_READ_BYTES)
    if start is None:
        return None
    try:
        size = header_bytes(memoryview(start)[: PREFIX.size])
        if size > len(start):
            start = engine.get_range(key, 0, size)
            if start is None:
                return None
        encoded = bytes(memoryview(start)[:size])
        header = _header_of(encoded) if size <= _FIRST_READ_BYTES else read_header(encoded)
        if header.key.to_bytes() != key:
            if has_tenants and header.key.page_hash == key[NAMESPACE_BYTES:]:
                return None
            raise ForeignPageError(f"page {header.key} is stored under another key")
        if header.object_bytes != object_bytes:
            raise TruncatedError(f"{object_bytes} of {header.object_bytes} bytes are stored")
    except FormatError as error:
        # One of a later format, too: the format is in the key, and who asks for this key is of this one.
        peer_metrics.STORE_DAMAGED.labels(error.reason).inc()
        logger.warning("deleting stored page %s, which can't be read: %s", PageKey.from_bytes(key), error)
        engine.delete(key)
        return None
    return encoded, PageLayout(object_bytes, header.group_ranges)


def plan_messages(layouts: Mapping[int, PageLayout], message_bytes: int) -> Iterator[list[Slice]]:
    """The slices of each message: group-major over all pages, at most ``message_bytes`` each."""
    message: list[Slice] = []
    free_bytes = message_bytes
    groups = max((len(layout.group_ranges) for layout in layouts.values()), default=0)
    for group in range(groups):
        for page_index, layout in layouts.items():
            if group >= len(layout.group_ranges):
                continue
            start, stop = layout.group_ranges[group]
            while start < stop:
                end = min(stop, start + free_bytes)
                message.append(Slice(page_index, start, end))
                free_bytes -= end - start
                start = end
                if not free_bytes:
                    yield message
                    message, free_bytes = [], message_bytes
    if message:
        yield message


@dataclasses.dataclass(frozen=True)
class FetchMessage:
    """One message of payload.

    Attributes:
        encoded: the serialized ``FetchResponse``.
        payload_bytes: object bytes in it.
        lost: pages found to have gone from the store since their header was read, each told once.
    """

    encoded: bytes
    payload_bytes: int
    lost: tuple[int, ...]


class PayloadReader:
    """Reads the messages of one Fetch in order; for one thread at a time."""

    def __init__(
        self, engine: StorageEngine, keys: Sequence[bytes], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads objects of ``engine``; ``keys`` by page index."""
        self._engine = engine
        self._keys = keys
        self._clock_s = clock_s
        self._lost: set[int] = set()
        self._read_at_s: dict[int, float] = {}
        """When a thread that may wait has last read some of a page."""

    def was_read(self, page_indexes: Iterable[int]) -> None:
        """A thread that may wait has read some of these pages now."""
        self._read_at_s.update(dict.fromkeys(page_indexes, self._clock_s()))

    def read(self, plans: Sequence[Sequence[Slice]]) -> list[FetchMessage]:
        """Reads each plan's slices into a message.

        Raises:
            StorageError: the engine failed.
        """
        with self._engine.ranges() as get_range:
            messages = [self._read_one(get_range, slices) for slices in plans]
        self.was_read(page_index for slices in plans for page_index, _, _ in slices)
        return messages

    def read_now(self, slices: Sequence[Slice]) -> FetchMessage | None:
        """The message of one plan; None where to read it may wait, so that it belongs into a thread.

        To copy what is in memory takes an event loop less time than to hand it over: both threads want the
        interpreter's lock, at each slice.

        Raises:
            StorageError: the engine failed.
        """
        since_s = self._clock_s() - AT_HAND_S
        if any(self._read_at_s.get(page_index, since_s) <= since_s for page_index, _, _ in slices):
            return None
        with self._engine.ranges_now() as get_range:
            return None if get_range is None else self._read_one(get_range, slices)

    def _read_one(self, get_range: RangeReader, slices: Sequence[Slice]) -> FetchMessage:
        fragments: list[tuple[int, int, Buffer]] = []
        lost = []
        payload_bytes = 0
        keys = self._keys
        for page_index, start, stop in slices:
            if page_index in self._lost:
                continue
            data = get_range(keys[page_index], start, stop)
            # A shorter object under the same key was stored anew in between; its other bytes fail the client's checks.
            if data is None or len(data) != stop - start:
                self._lost.add(page_index)
                lost.append(page_index)
                continue
            fragments.append((page_index, start, data))
            payload_bytes += len(data)
        return FetchMessage(encode_fragments(fragments), payload_bytes, tuple(lost))
