"""On which CPUs the threads of kvcodec run, apart from those of the server they serve."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set

from sglang_kvcodec.errors import ConfigurationError

_chosen: Set[int] = frozenset()
"""Of this process, which has one server; none for all that it may use."""


@contextlib.contextmanager
def starting_on(cpus: Set[int]) -> Iterator[None]:
    """Has what is started inside run on these CPUs and no others, and the threads that :func:`take_place` from then on.

    A thread or process that is started inherits the CPUs of the thread that starts it. None: changes nothing.

    Raises:
        ConfigurationError: this process can't have one of them.
    """
    global _chosen
    _chosen = frozenset(cpus)
    if not cpus:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigurationError("this system does not let a program choose its CPUs; leave cpus away")
    before = os.sched_getaffinity(0)
    try:
        _move(cpus)
        yield
    finally:
        os.sched_setaffinity(0, before)


def take_place() -> None:
    """Moves this thread to the CPUs that were chosen; for threads that a pool starts when it needs them."""
    if _chosen:
        os.sched_setaffinity(0, _chosen)


def _move(cpus: Set[int]) -> None:
    # On Linux 0 is the calling thread, not its process.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus)
    missing = sorted(cpus - os.sched_getaffinity(0))
    if missing:
        raise ConfigurationError(f"this process can't run on CPU {', '.join(map(str, missing))}")
