"""What lies in a store whose engine keeps no order: sizes and uses in this process's memory, and room for puts."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage.base import StoredObject

_ROOM_WAIT_S = 10.0


class LruIndex:
    """Counts bytes from before an object is written until it has been deleted. Thread-safe."""

    def __init__(
        self, capacity_bytes: int, objects: Iterable[tuple[bytes, StoredObject]], evicted_objects: int
    ) -> None:
        """An index of ``objects``, the least recently used first; may be over its capacity, see :meth:`overflow`."""
        self._capacity_bytes = capacity_bytes
        self._changed = threading.Condition()
        self._objects = OrderedDict(objects)
        self._putting: dict[bytes, int] = {}
        self._doomed: dict[bytes, int] = {}
        self._deleting: set[bytes] = set()
        """Those of the doomed that somebody has been told to delete: a put waits, or the deletion could hit it."""
        self.stored_bytes = sum(found.size_bytes for found in self._objects.values())
        self.evicted_objects = evicted_objects

    def __len__(self) -> int:
        return len(self._objects)

    def use(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """The objects; marks them as used, the first one last."""
        with self._changed:
            for key in reversed(keys):
                if key in self._objects:
                    self._objects.move_to_end(key)
            return [self._objects.get(key) for key in keys]

    def peek(self, keys: Sequence[bytes]) -> list[StoredObject | None]:
        """The objects; does not mark them."""
        with self._changed:
            return [self._objects.get(key) for key in keys]

    def keys(self) -> list[bytes]:
        """All keys, the least recently used first."""
        with self._changed:
            return list(self._objects)

    def begin_put(self, key: bytes, size_bytes: int) -> list[bytes] | None:
        """Holds room for an object, once what is in its way is gone; waits for another put or deletion of it.

        Returns:
            None if the object is there; an empty list when the room is held; else keys to delete before it is called
            again, see :meth:`deleted`.

        Raises:
            CapacityError: larger than the whole capacity.
            StorageUnavailableError: others hold all the room.
        """
        if size_bytes > self._capacity_bytes:
            raise CapacityError(f"an object of {size_bytes} bytes can't fit in {self._capacity_bytes}")
        deadline_s = time.monotonic() + _ROOM_WAIT_S
        with self._changed:
            while True:
                if key in self._objects:
                    self._objects.move_to_end(key)
                    return None
                if key in self._doomed:
                    if key not in self._deleting:
                        self._deleting.add(key)
                        return [key]
                elif key not in self._putting:
                    missing_bytes = self._held_bytes() + size_bytes - self._capacity_bytes
                    if missing_bytes <= 0:
                        self._putting[key] = size_bytes
                        return []
                    victims = self._doom(missing_bytes)
                    if victims:
                        return victims
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise StorageUnavailableError(f"no room for {size_bytes} bytes: puts under way hold it")

    def end_put(self, key: bytes, stored: StoredObject | None, *, is_uncertain: bool = False) -> None:
        """Ends what :meth:`begin_put` began: the object as it lies there, None if it does not.

        If that is uncertain, the caller deletes it, see :meth:`deleted`.
        """
        with self._changed:
            size_bytes = self._putting.pop(key)
            if stored is not None:
                self._objects[key] = stored
                self.stored_bytes += stored.size_bytes
            elif is_uncertain:
                self._doomed[key] = size_bytes
                self._deleting.add(key)
            self._changed.notify_all()

    def remove(self, key: bytes) -> bool:
        """Forgets an object, which the caller deletes if it was there, see :meth:`deleted`."""
        with self._changed:
            found = self._objects.pop(key, None)
            if found is not None:
                self.stored_bytes -= found.size_bytes
                self._doomed[key] = found.size_bytes
                self._deleting.add(key)
            return found is not None

    def deleted(self, keys: Iterable[bytes], *, have_gone: bool = True) -> None:
        """Told by whoever got keys to delete: their bytes are free, or it did not work and another is to try."""
        with self._changed:
            for key in keys:
                self._deleting.discard(key)
                if have_gone:
                    self._doomed.pop(key, None)
            self._changed.notify_all()

    def resize(self, capacity_bytes: int) -> None:
        """Changes the capacity; it may be over it afterwards, see :meth:`overflow`."""
        with self._changed:
            self._capacity_bytes = capacity_bytes
            self._changed.notify_all()

    def overflow(self) -> list[bytes]:
        """Keys to delete so that the capacity holds."""
        with self._changed:
            missing_bytes = self._held_bytes() - self._capacity_bytes
            return self._doom(missing_bytes) if missing_bytes > 0 else []

    def adopt(self, found: Iterable[tuple[bytes, StoredObject]]) -> None:
        """Takes in objects that were found and that it did not know."""
        with self._changed:
            for key, stored in found:
                if key not in self._objects and key not in self._putting and key not in self._doomed:
                    self._objects[key] = stored
                    self.stored_bytes += stored.size_bytes

    def _held_bytes(self) -> int:
        return self.stored_bytes + sum(self._putting.values()) + sum(self._doomed.values())

    def _doom(self, missing_bytes: int) -> list[bytes]:
        """What is left to delete, then the least recently used: not more than needed."""
        victims = [key for key in self._doomed if key not in self._deleting]
        freed_bytes = sum(self._doomed.values())
        while freed_bytes < missing_bytes and self._objects:
            key, oldest = self._objects.popitem(last=False)
            self.stored_bytes -= oldest.size_bytes
            self.evicted_objects += 1
            self._doomed[key] = oldest.size_bytes
            freed_bytes += oldest.size_bytes
            victims.append(key)
        self._deleting.update(victims)
        return victims
