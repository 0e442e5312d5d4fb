"""How a fetch ends for its request: what it has, and what is counted of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.pacing import PROGRESS, SILENCE
from sglang_kvcodec.format.page_object import PageObject

logger = logging.getLogger(__name__)

OVERTAKEN = "overtaken"
"""Outcome of a fetch that was given up because computing had become faster."""


class FetchEndings:
    """Ends tickets, each once."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        """``on_done`` is called after each ticket is done."""
        self._on_done = on_done

    def end(self, ticket: FetchTicket, outcome: str, pages: Sequence[PageObject] = ()) -> None:
        """Nothing more will arrive but ``pages``."""
        if ticket.settle(pages):
            self._finish(ticket, outcome)

    def overtaken(self, ticket: FetchTicket, phase: str) -> None:
        """Computing is faster than what is left of the fetch; called on the pacer's thread."""
        if ticket.is_cancelled:
            return
        logger.debug("kvcodec: a fetch is given up in phase %s: computing is faster by now", phase)
        if phase in (PROGRESS, SILENCE):
            metrics.FETCH_CUTS.labels(phase=phase).inc()
            ticket.cut(phase)
        elif ticket.abandon(phase):
            metrics.FETCH_CUTS.labels(phase=phase).inc()
            self._finish(ticket, OVERTAKEN)

    def _finish(self, ticket: FetchTicket, outcome: str) -> None:
        metrics.FETCHES.labels(outcome=outcome).inc()
        used = 0 if ticket.is_promised and not ticket.is_kept else len(ticket.pages)
        unused = ticket.stored_pages - used
        if unused and ticket.tail is None:
            metrics.MISSES.labels(reason=outcome).inc(unused)
        not_stored = len(ticket.page_hashes) - ticket.stored_pages
        if not_stored:
            metrics.MISSES.labels(reason="not_stored").inc(not_stored)
        ticket.finish()
        self._on_done()
