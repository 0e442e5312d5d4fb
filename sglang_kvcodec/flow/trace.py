"""A trace of every request, in the JSON that Chrome's ``about:tracing`` and ui.perfetto.dev read.

Whoever has something to tell appends it to a bounded queue and goes on; one thread writes. The file is an array that
may end anywhere (Trace Event Format, "JSON Array Format": the closing bracket is optional), so that one that is still
being written, or whose server was killed, can be looked at.

Each request is a track of its own, of async events ("b", "e") named by its id; work of threads are complete events
("X"). SGLang's own traces are another thing: its OpenTelemetry spans need a collector and know nothing of what is below
a request's stages, and its profiler records every kernel of some seconds.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import ConfigurationError

logger = logging.getLogger(__name__)

MAX_QUEUED_EVENTS = 1 << 16
MAX_FILE_BYTES = 1 << 30
"""What comes after so many bytes is dropped, and counted."""
_PERIOD_S = 0.1


class Tracer:
    """Takes events; one that is off takes them for nothing. Thread-safe, never waits.

    All times are seconds of the monotonic clock.
    """

    is_on = False

    def span(self, rid: str, name: str, start_s: float, end_s: float, **values: object) -> None:
        """Something that took a request from ``start_s`` to ``end_s``."""

    def work(self, name: str, start_s: float, end_s: float, **values: object) -> None:
        """What the calling thread has done from ``start_s`` to ``end_s``."""

    def counter(self, name: str, **values: float) -> None:
        """Values as of now, drawn as a curve."""

    def close(self) -> None:
        """Writes what is queued and ends. May be called twice."""


class FileTracer(Tracer):
    """Writes a file."""

    is_on = True

    def __init__(self, path: pathlib.Path, process_name: str, max_bytes: int = MAX_FILE_BYTES) -> None:
        """Opens the file, over one that is there, and starts the thread.

        Raises:
            ConfigurationError: it can't be written.
        """
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"the trace {path} can't be written: {error}") from error
        self._path = path
        self._pid = os.getpid()
        self._max_bytes = max_bytes
        self._written_bytes = 0
        self._events: collections.deque[dict[str, Any]] = collections.deque()
        self._named_threads: set[int] = set()
        self._wake = threading.Event()
        self._is_closed = False
        self._add(name="process_name", ph="M", args={"name": process_name})
        self._thread = threading.Thread(target=self._run, name="kvcodec-trace", daemon=True)
        self._thread.start()

    def span(self, rid: str, name: str, start_s: float, end_s: float, **values: object) -> None:
        """See :class:`Tracer`."""
        common = {"name": name, "cat": "request", "id": rid}
        self._add(**common, ph="b", ts=_us(start_s), args=values)
        self._add(**common, ph="e", ts=_us(max(start_s, end_s)))

    def work(self, name: str, start_s: float, end_s: float, **values: object) -> None:
        """See :class:`Tracer`."""
        thread = threading.get_native_id()
        if thread not in self._named_threads:
            self._named_threads.add(thread)
            self._add(name="thread_name", ph="M", tid=thread, args={"name": threading.current_thread().name})
        self._add(
            name=name, cat="work", ph="X", ts=_us(start_s), dur=_us(max(0.0, end_s - start_s)), tid=thread, args=values
        )

    def counter(self, name: str, **values: float) -> None:
        """See :class:`Tracer`."""
        self._add(name=name, ph="C", ts=_us(time.monotonic()), args=values)

    def close(self) -> None:
        """See :class:`Tracer`."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(timeout=10)

    def _add(self, **event: object) -> None:
        # Appending to a deque is atomic. The bound may be passed by as many events as there are threads.
        if len(self._events) >= MAX_QUEUED_EVENTS or self._is_closed:
            metrics.TRACE_DROPS.inc()
        else:
            self._events.append({"pid": self._pid, "tid": 0, **event})

    def _run(self) -> None:
        separator = "[\n"
        try:
            with self._file:
                while True:
                    is_last = self._is_closed
                    while self._events:
                        text = separator + _json(self._events.popleft())
                        if self._written_bytes + len(text) > self._max_bytes:
                            metrics.TRACE_DROPS.inc()
                            continue
                        self._file.write(text)
                        self._written_bytes += len(text)
                        separator = ",\n"
                    if is_last:
                        self._file.write("\n]\n")
                        return
                    self._file.flush()
                    self._wake.wait(_PERIOD_S)
        except OSError as error:
            # The trace is lost, and nothing else.
            self._is_closed = True
            logger.error("kvcodec: the trace %s ends here: %s", self._path, error)


def open_tracer(path: str, process_name: str, rank: int) -> Tracer:
    """A tracer to ``path``, which is off if that is empty; ranks above 0 put theirs beside it.

    Raises:
        ConfigurationError: the file can't be written.
    """
    if not path:
        return Tracer()
    file = pathlib.Path(path)
    return FileTracer(file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}"), process_name)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _json(event: Mapping[str, object]) -> str:
    return json.dumps(event, separators=(",", ":"), default=str)
