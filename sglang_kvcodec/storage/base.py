"""The interface of a storage engine: bytes under 64-byte keys, bounded, atomic. Nothing here knows page objects."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

KEY_BYTES = 64
RangeReader = Callable[[bytes, int, int], bytes | memoryview | None]
"""A function with the arguments and the result of :meth:`StorageEngine.get_range`."""


class StoredObject(NamedTuple):
    """An object, without its bytes: its size, and when it was put, in seconds of Unix time."""

    size_bytes: int
    stored_at_s: float


@dataclasses.dataclass(frozen=True)
class StoreStat:
    """Counts of an engine.

    Attributes:
        objects: objects stored now.
        stored_bytes: their bytes, as counted against the capacity.
        capacity_bytes: the bound that is never exceeded.
        evicted_objects: objects evicted to make room since the store was created.
    """

    objects: int
    stored_bytes: int
    capacity_bytes: int
    evicted_objects: int


class StorageEngine(abc.ABC):
    """Stores objects. Every method is thread-safe and may block on a disk.

    When there is no room, the least recently used objects go. Of keys used in one call the first ones count as used
    last: they are a prefix, and a page is useless without the pages before it, so tails are evicted first.
    """

    name: str
    reads_wait = True
    """Whether a read may wait for a disk, and so belongs into a thread of its own."""
    waits_for_network = False
    """Whether every call waits for another machine, so that many threads at once are of use."""

    @abc.abstractmethod
    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Size in bytes of each object, None where there is none; marks those found as used."""

    @abc.abstractmethod
    def get(self, key: bytes) -> bytes | None:
        """The object, whole, or None; marks it as used.

        Raises:
            StorageUnavailableError: the engine failed; the object may still be there.
        """

    @abc.abstractmethod
    def get_range(self, key: bytes, start: int, stop: int) -> bytes | memoryview | None:
        """Bytes ``[start, stop)`` of the object, fewer where it ends before; None where there is none.

        Does not mark it as used: a peer reads the pages of a prefix in many such slices, after a ``sizes`` that marked
        them in the right order. A view stays valid for as long as it is held.

        Raises:
            StorageUnavailableError: the engine failed; the object may still be there.
        """

    @contextlib.contextmanager
    def ranges(self) -> Iterator[RangeReader]:
        """Gives a :meth:`get_range` for many reads in a row, on the thread that entered, at less than their price.

        What it returns may be a view that is valid only until the block ends.

        Raises:
            StorageUnavailableError: the engine failed.
        """
        yield self.get_range

    @contextlib.contextmanager
    def ranges_now(self) -> Iterator[RangeReader | None]:
        """The same for a thread that must not wait, as an event loop's: it may read what was read a moment ago.

        Gives None where to enter the block, or to read in it what :meth:`get_range` gave within the last second, may
        wait for more than memory.
        """
        yield None

    @contextlib.contextmanager
    def reading_ahead(self, objects: Sequence[tuple[bytes, int]]) -> Iterator[None]:
        """Tells that the parts of these objects, given with their sizes in bytes, are about to be read in the block.

        Takes no time by itself. What is read may be as it was when the block began.

        Raises:
            StorageUnavailableError: the engine failed.
        """
        yield

    @abc.abstractmethod
    def put(self, key: bytes, value: bytes) -> bool:
        """Stores an object: afterwards it is there whole and survives a crash as far as the engine can promise.

        An object that is already there is left as it is, and counts as used.

        Returns:
            True if it was stored now, False if it was already there.

        Raises:
            CapacityError: larger than the whole capacity; nothing changed.
            StorageUnavailableError: the engine failed (disk full, read-only); nothing of the object is visible.
        """

    @abc.abstractmethod
    def delete(self, key: bytes) -> bool:
        """Removes an object; whether it was there."""

    @abc.abstractmethod
    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """Size and time of the put of each object; None where there is none. Does not mark it as used."""

    def stored_at_s(self, keys: Sequence[bytes]) -> list[float | None]:
        """When each object was put, in seconds of Unix time; None where there is none. Does not mark it as used."""
        return [None if found is None else found.stored_at_s for found in self.peek(keys)]

    @abc.abstractmethod
    def key_batches(self) -> Iterator[list[bytes]]:
        """All keys, some at a time, in no order: every object that stays while they are listed, at least once.

        Raises:
            StorageUnavailableError: the engine failed.
        """

    def tidy(self) -> None:  # noqa: B027  (most engines leave nothing behind)
        """Removes what a crash has left beside the objects; for a thread that has time.

        Raises:
            StorageUnavailableError: the engine failed.
        """

    @abc.abstractmethod
    def resize(self, capacity_bytes: int) -> None:
        """Changes the bound of the stored bytes, at least 1; what is over it has been evicted when this returns.

        Raises:
            StorageUnavailableError: the engine failed; the new bound holds for what is put from now on.
        """

    @abc.abstractmethod
    def stat(self) -> StoreStat:
        """Counts now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes and releases everything; the engine is unusable afterwards. May be called twice."""
