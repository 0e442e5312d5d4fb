"""A queue whose items have turns, and of which the oldest can be dropped to make room."""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class TurnQueue(Generic[Item]):
    """Gives items by their turns, the least first, and drops them by their age. Thread-safe."""

    def __init__(self) -> None:
        """Empty and open."""
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._turns: list[tuple[float, int]] = []
        """A heap of turns and numbers; some of items that were dropped."""
        self._items: dict[int, Item] = {}
        """By number, the oldest first."""
        self._is_closed = False

    def put(self, turn: float, item: Item) -> None:
        """Adds an item."""
        with self._changed:
            number = next(self._numbers)
            self._items[number] = item
            heapq.heappush(self._turns, (turn, number))
            self._changed.notify()

    def get(self) -> Item | None:
        """Waits for the next item and takes it; None once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed)
            while self._turns:
                item = self._items.pop(heapq.heappop(self._turns)[1], None)
                if item is not None:
                    return item
            return None

    def waiting(self) -> list[Item]:
        """What is in it, the oldest first."""
        with self._changed:
            return list(self._items.values())

    def drop_oldest(self) -> Item | None:
        """Takes the item that has been in it for longest; None if it is empty."""
        with self._changed:
            oldest = next(iter(self._items), None)
            return None if oldest is None else self._items.pop(oldest)

    def close(self) -> None:
        """No more will be added; what is in it can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
