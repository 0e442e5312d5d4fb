"""Ends calls that fall silent, or that their caller has given up."""

from __future__ import annotations

import enum
import threading
import time
from typing import Protocol

_PERIOD_S = 0.02


class Cancellable(Protocol):
    """A gRPC call."""

    def cancel(self) -> bool:
        """Ends it."""
        ...


class Verdict(enum.Enum):
    """Why a call was ended from here."""

    SILENT = "silent"
    CANCELLED = "cancelled"


class WatchedCall:
    """One call under watch. Time counts as silence only between :meth:`waiting` and :meth:`heard`."""

    def __init__(self, call: Cancellable, silence_s: float, cancelled: threading.Event | None) -> None:
        self.verdict: Verdict | None = None
        self._call = call
        self._silence_s = silence_s
        self._cancelled = cancelled
        self._waiting_since_s: float | None = None

    @property
    def given_up(self) -> bool:
        """Whether the caller has cancelled."""
        return self._cancelled is not None and self._cancelled.is_set()

    def waiting(self) -> None:
        """From now on the other side has to say something."""
        self._waiting_since_s = time.monotonic()

    def heard(self) -> None:
        """It has."""
        self._waiting_since_s = None

    def judge(self, now_s: float) -> None:
        """Ends the call if it is due."""
        since_s = self._waiting_since_s
        if self.given_up:
            self.verdict = Verdict.CANCELLED
        elif since_s is not None and now_s - since_s > self._silence_s:
            self.verdict = Verdict.SILENT
        else:
            return
        self._call.cancel()


class CallWatch:
    """One thread that watches all calls of a client; it sleeps while there are none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: set[WatchedCall] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, watched: WatchedCall) -> None:
        """Watches a call until :meth:`remove`."""
        with self._changed:
            self._watched.add(watched)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="kvcodec-rpc-watch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, watched: WatchedCall) -> None:
        """Watches it no longer."""
        with self._changed:
            self._watched.discard(watched)

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._watched)
                if self._closed:
                    return
                due = [watched for watched in self._watched if watched.verdict is None]
            for watched in due:
                watched.judge(time.monotonic())
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=_PERIOD_S)
