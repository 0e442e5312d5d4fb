"""What kvcodec takes of a scheduler's thread, from one scheduling pass to the next."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from sglang_kvcodec import metrics

F = TypeVar("F", bound=Callable[..., Any])


class SchedulerTime:
    """Adds up the time inside of what is :func:`timed`. For the scheduler's thread alone."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._depth = 0
        self._begun_s = 0.0
        self._taken_s = 0.0

    def begin(self) -> None:
        """Something of ours begins, maybe inside something else of ours."""
        if self._depth == 0:
            self._begun_s = time.perf_counter()
        self._depth += 1

    def end(self) -> None:
        """It has ended."""
        self._depth -= 1
        if self._depth == 0:
            self._taken_s += time.perf_counter() - self._begun_s

    def next_pass(self) -> None:
        """A scheduling pass begins. One in which nothing was done is left out: an idle scheduler has thousands."""
        if self._taken_s:
            metrics.SCHEDULER_SECONDS.observe(self._taken_s)
            self._taken_s = 0.0


def timed(method: F) -> F:
    """A method that SGLang calls on its scheduler's thread and that waits for nothing.

    Its object has a ``scheduler_time``.
    """

    @functools.wraps(method)
    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken: SchedulerTime = self.scheduler_time
        taken.begin()
        try:
            return method(self, *args, **kwargs)
        finally:
            taken.end()

    return cast(F, measured)
