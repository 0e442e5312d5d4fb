"""Tries a link that is believed to be slow, with pages that nobody waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.flow.arrivals import Arrivals
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.exploring import Explorer
from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.stored_prefix import StoredPrefix
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.namespace import PageKey

logger = logging.getLogger(__name__)


class LinkTrials:
    """Of one peer's link, as often and as long as an :class:`Explorer` allows. Thread-safe."""

    def __init__(self, link: LinkMeter, transfers: Transfers, arrivals: Arrivals, monitor: PeerMonitor) -> None:
        """No trial is under way.

        Args:
            link: to be measured.
            transfers: bring pages over it.
            arrivals: keep them.
            monitor: told if the peer fails.
        """
        self._link = link
        self._transfers = transfers
        self._arrivals = arrivals
        self._monitor = monitor
        self._explorer = Explorer()

    def found_fast(self) -> None:
        """A fetch is worth it again."""
        self._explorer.found_fast()

    def pages_to_try(self, page_bytes: Sequence[int]) -> int:
        """How many pages of these sizes are to be tried; 0 for not now."""
        return self._explorer.pages(self._link.age_s, page_bytes)

    def is_enough(self, start_s: float) -> bool:
        """Whether a transfer that began then has measured the link."""
        return self._explorer.is_enough(self._link.age_s, start_s)

    def run(self, stored: StoredPrefix, wanted: Sequence[bytes]) -> None:
        """Fetches a little that nobody waits for, to see whether the link has become fast."""
        if not self._explorer.begin():
            return
        damaged: list[PageKey] = []
        try:
            metrics.EXPLORATIONS.inc()
            start_s = time.monotonic()
            course = Course([stored], 0, len(wanted))
            receiver = self._arrivals.receiver_along(course, wanted)
            for event in self._transfers.along(course, wanted, threading.Event()):
                receiver.add(event)
                if receiver.is_complete or self.is_enough(start_s):
                    break
            damaged = self._arrivals.keep(receiver, wanted, receiver.whole_prefix())
        except PeerError as error:
            self._monitor.failed("fetch", error)
        except Exception:
            # A thread's top.
            logger.exception("kvcodec: a link was not measured")
        finally:
            self._explorer.end()
        self._arrivals.drop_damaged(damaged)
