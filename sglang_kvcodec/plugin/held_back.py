"""Keeps requests that wait for their pages out of SGLang's way while it looks for a batch.

SGLang asks each request of its queue in each pass, which takes it a hundredth of a millisecond or more, however long
their pages take: with a hundred that wait, as much as a tenth of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from sglang_kvcodec.plugin.scheduler_time import SchedulerTime, timed

ALL_EVERY = 32
"""Passes from one in which SGLang sees the whole queue to the next, and notes that they wait."""
MOST_TOUCHED = 128
"""Of those that wait; what they have on the device is not the next to be evicted. Both numbers are SGLang's own
(``schedule_policy.py``, ``_touch_waiting_prefixes``), which seldom sees them."""


class HeldBack:
    """Of one scheduler; runs on its thread, on all ranks alike."""

    def __init__(self, touch: Callable[[Any], None], scheduler_time: SchedulerTime) -> None:
        """No pass yet.

        Args:
            touch: marks what a request has on the device as used.
            scheduler_time: told what this takes of the scheduler's thread.
        """
        self.scheduler_time = scheduler_time
        self._touch = touch
        self._passes = 0

    def around(self, scheduler: Any, waiting: Set[str], look: Callable[[], Any]) -> Any:
        """Looks for a batch among the requests that do not wait.

        Args:
            scheduler: whose ``waiting_queue`` is all of them; afterwards it holds those that wait at their old places.
            waiting: those that wait for their pages, by their ids.
            look: SGLang's own search, which takes requests out of the queue, sorts it, or adds some.

        Returns:
            What ``look`` returns.
        """
        self._passes += 1
        queue: Sequence[Any] = scheduler.waiting_queue
        if self._passes % ALL_EVERY == 0:
            self._touch_all(queue, waiting)
            return look()
        scheduler.waiting_queue = self._others(queue, waiting)
        try:
            return look()
        finally:
            scheduler.waiting_queue = self._merged(queue, waiting, scheduler.waiting_queue)

    @timed
    def _touch_all(self, queue: Sequence[Any], waiting: Set[str]) -> None:
        held = [req for req in queue if req.rid in waiting]
        for req in reversed(held[:MOST_TOUCHED]):
            self._touch(req)

    @timed
    def _others(self, queue: Sequence[Any], waiting: Set[str]) -> list[Any]:
        return [req for req in queue if req.rid not in waiting]

    @timed
    def _merged(self, before: Sequence[Any], waiting: Set[str], after: Sequence[Any]) -> list[Any]:
        """The queue with those that were held back at their places, or at its end if the others were sorted."""
        if not after:
            return [req for req in before if req.rid in waiting]
        places = {id(req): place for place, req in enumerate(before)}
        old = [places[id(req)] for req in after if id(req) in places]
        came = list(after[len(old) :])
        if old != sorted(old) or any(id(req) in places for req in came):
            # It was sorted, and will be again before anyone is taken of it.
            return [*after, *(req for req in before if req.rid in waiting)]
        left = {*old}
        return [req for place, req in enumerate(before) if place in left or req.rid in waiting] + came
