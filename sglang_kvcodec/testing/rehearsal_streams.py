"""Streams to rehearse the restorer's choreography with on a CPU: they work in the background of nobody, and keep a log.

What is asked of a stream is done at once, so that a decoder's planes are read when the call says so: after the next
``Decode`` of the stand-in they hold other pictures. What the log is for is the order: which stream did what, and what
it was told to wait for before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class RehearsalEvent:
    """A place in the log."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.name = name
        self._log = log

    def __repr__(self) -> str:
        return self.name

    def query(self) -> bool:
        """It has happened."""
        return True

    def synchronize(self) -> None:
        """A host that waits is in the log."""
        self._log.append(("host waits for", self.name))


class RehearsalStreams:
    """Makes ``DeviceStream`` objects, as ``PagedKVPool`` wants them.

    Attributes:
        log: in order, what each stream did: its handle and ``"work"``, ``"read"``, ``"record"`` with the event's name,
            or ``"wait"`` with the names of events; and ``("host waits for", event)``.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.interpreter = threading.RLock()
        """Triton's interpreter takes one thread at a time."""
        self._events = 0

    def __call__(self, device: torch.device, handle: int) -> RehearsalStream:
        """The stream with a handle."""
        return RehearsalStream(self, handle)

    def new_event(self, name: str = "") -> RehearsalEvent:
        """An event under a name, or under a number of its own."""
        with self.interpreter:
            self._events += 1
            return RehearsalEvent(name or f"event {self._events}", self.log)


class RehearsalStream:
    """One of them."""

    def __init__(self, streams: RehearsalStreams, handle: int) -> None:
        self._streams, self._handle = streams, handle

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keeps other threads out of the interpreter."""
        with self._streams.interpreter:
            self._streams.log.append((self._handle, "work"))
            yield

    def wait_for(self, events: Sequence[Any]) -> None:
        """Takes note."""
        self._streams.log.append((self._handle, "wait", *(event.name for event in events)))

    def record(self) -> RehearsalEvent:
        """A new event."""
        event = self._streams.new_event()
        self._streams.log.append((self._handle, "record", event.name))
        return event

    def read(self, values: torch.Tensor) -> _Copy:
        """The values as they are now."""
        self._streams.log.append((self._handle, "read"))
        return _Copy(values.clone(), self._streams.new_event("what was read"))


class _Copy:
    """As ``HostCopy``; whoever does not wait gets nothing."""

    def __init__(self, values: torch.Tensor, event: RehearsalEvent) -> None:
        self._values, self._event = values, event

    def wait(self) -> torch.Tensor:
        self._event.synchronize()
        return self._values
