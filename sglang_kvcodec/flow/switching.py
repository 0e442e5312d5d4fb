"""Goes on with another tier in the middle of a fetch, when the link has become another one than was planned with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.early_admission import EarlyAdmission
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.pacing import PROGRESS, Flight
from sglang_kvcodec.flow.planner import Choice, choose_rest
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.receiver import Receiver
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.namespace import PageKey

logger = logging.getLogger(__name__)

PERIOD_S = 0.1
"""So often another tier is thought about while a block is under way; before each block it is in any case."""


class Switcher:
    """Watches one fetch, on its thread, and changes its course.

    Before a block nothing has arrived of what is left. Within one, pages have begun, layer group by layer group, and
    are asked for again in the other tier: never once they are promised, for they may be in use.
    """

    def __init__(
        self,
        known: Callable[[str], Knowledge],
        ticket: FetchTicket,
        flight: Flight,
        course: Course,
        receiver: Receiver,
        prefix: Prefix,
        tracer: Tracer,
    ) -> None:
        """Watches a fetch that begins.

        Args:
            known: what is known now, of a profile.
            ticket: of the fetch.
            flight: told what is to come after a switch.
            course: changed by a switch.
            receiver: told what is to come after a switch.
            prefix: the pages that were planned.
            tracer: told of switches.
        """
        self.admission = EarlyAdmission(prefix)
        """Of what is being fetched; another one after a switch."""
        self._known, self._ticket, self._flight = known, ticket, flight
        self._course, self._receiver, self._prefix, self._tracer = course, receiver, prefix, tracer
        self._block_first = 0
        self._next_s = 0.0

    def before_block(self, first: int) -> None:
        """The next block begins with page ``first``."""
        self._block_first, self._next_s = first, time.monotonic() + PERIOD_S
        # The first block is as it was planned.
        if first and self._course.has_choice:
            self._consider(first, None)

    def within_block(self) -> None:
        """Something has arrived of a block that is not over."""
        if not self._course.has_choice or self._ticket.is_promised or self._receiver.failure:
            return
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + PERIOD_S
            missing_bytes = max(0, sum(self._course.page_bytes) - self._receiver.received_bytes)
            self._consider(max(self._block_first, self._receiver.whole_pages), missing_bytes)

    def _consider(self, first: int, missing_bytes: int | None) -> None:
        """Switches at page ``first`` if that pays; None where nothing has arrived of it and what follows."""
        course = self._course
        sizes = [course.rest_bytes(index, first) for index in range(len(course.prefixes))]
        sizes[course.choice] = _scaled(course.page_bytes[first:], missing_bytes)
        self._flight.could_be(min(map(sum, sizes)))
        choices = [
            Choice(self._rest(first, size), self._known(stored.profile_name))
            for size, stored in zip(sizes, course.prefixes, strict=True)
        ]
        choice = choose_rest(choices, course.choice)
        if choice != course.choice:
            self._switch(choice, first)

    def _rest(self, first: int, page_bytes: Sequence[int]) -> Prefix:
        prefix = self._prefix
        before = prefix.tokens_before + first * prefix.page_tokens
        return Prefix(page_bytes, prefix.page_tokens, before, max(prefix.prompt_tokens, before + 1))

    def _switch(self, choice: int, first: int) -> None:
        course, receiver, flight = self._course, self._receiver, self._flight
        old, new = course.prefixes[course.choice].profile_name, course.prefixes[choice].profile_name
        logger.debug("kvcodec: a fetch goes on with %s instead of %s from page %d on", new, old, first)
        course.switch(choice, first)
        hashes = self._ticket.page_hashes[first : course.pages]
        keys = [PageKey(*place) for place in zip(course.namespaces[first:], hashes, strict=True)]
        receiver.expect(first, keys, course.page_bytes[first:])
        now_s = time.monotonic()
        prefix = self._prefix
        whole = Prefix(course.page_bytes[:], prefix.page_tokens, prefix.tokens_before, prefix.prompt_tokens)
        flight.profile_name = new
        flight.begin(PROGRESS, now_s, whole)
        flight.progress(receiver.received_bytes, receiver.whole_pages)
        self.admission = EarlyAdmission(whole)
        metrics.TIER_SWITCHES.labels(tier=new).inc()
        self._tracer.span(self._ticket.rid, "switch", now_s, now_s, tier=new, first_page=first)


def _scaled(page_bytes: Sequence[int], total_bytes: int | None) -> list[int]:
    """The sizes, scaled to a sum; as they are without one."""
    whole = sum(page_bytes)
    if total_bytes is None or not whole:
        return list(page_bytes)
    return [size * total_bytes // whole for size in page_bytes]
