"""Fetches the start of a prefix, for a request that waits for it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.flow.arrivals import Arrivals
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.early_admission import EarlyAdmission
from sglang_kvcodec.flow.fetch_endings import OVERTAKEN
from sglang_kvcodec.flow.fetch_planning import PlannedFetch
from sglang_kvcodec.flow.link_trials import LinkTrials
from sglang_kvcodec.flow.pacing import FIRST_BYTE, Pacer
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.receiver import Receiver
from sglang_kvcodec.flow.switching import Switcher
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject


@dataclasses.dataclass
class Fetched:
    """What a fetch has brought, filled while it runs: it counts however the fetch ends.

    Attributes:
        pages: that can be used.
        damaged: keys of those that can't.
        choice: of the planned prefixes, the one that it came to.
    """

    pages: list[PageObject] = dataclasses.field(default_factory=list)
    damaged: list[PageKey] = dataclasses.field(default_factory=list)
    choice: int = 0


class PrefixFetcher:
    """Runs such fetches, on threads of its callers'."""

    def __init__(
        self,
        transfers: Transfers,
        arrivals: Arrivals,
        trials: LinkTrials,
        pacer: Pacer,
        monitor: PeerMonitor,
        tracer: Tracer,
        admits_early: bool,
        on_promise: Callable[[], None],
    ) -> None:
        """No fetch is under way.

        Args:
            transfers: bring the pages.
            arrivals: keep them.
            trials: say when a fetch that nobody waits for any more has measured the link.
            pacer: says what is known beside the other fetches.
            monitor: told if the peer fails.
            tracer: told what happens.
            admits_early: whether requests may be admitted before all has arrived.
            on_promise: called when one may, on the thread that fetches.
        """
        self._transfers = transfers
        self._arrivals = arrivals
        self._trials = trials
        self._pacer = pacer
        self._monitor = monitor
        self._tracer = tracer
        self._admits_early = admits_early
        self._on_promise = on_promise

    def fetch(self, planned: PlannedFetch, fetched: Fetched) -> str:
        """Fetches what was planned into ``fetched``; why it ended."""
        ticket, flight, deadline_s = planned.ticket, planned.flight, planned.deadline_s
        if ticket.was_cut():
            return OVERTAKEN
        if ticket.is_cancelled:
            return "cancelled"
        now_s = time.monotonic()
        if now_s > deadline_s:
            return "too_slow"
        self._tracer.span(ticket.rid, "fetch queue", planned.at_s, now_s)
        outcome = planned.plan.reason
        wanted = ticket.page_hashes[: planned.plan.pages]
        course = Course(planned.prefixes, planned.choice, len(wanted), planned.plan.overlap_s)
        receiver = self._arrivals.receiver_along(course, wanted)
        switcher = Switcher(
            functools.partial(self._pacer.knowledge, flight),
            ticket,
            flight,
            course,
            receiver,
            planned.prefix,
            self._tracer,
        )
        flight.begin(FIRST_BYTE, now_s, planned.prefix)
        try:
            for event in self._transfers.along(course, wanted, ticket.stop, flight, ticket.rid, switcher.before_block):
                receiver.add(event)
                if receiver.is_complete:
                    break
                if ticket.has_gone_on() and self._trials.is_enough(ticket.start_s):
                    break
                if time.monotonic() > deadline_s:
                    outcome = "too_slow"
                    break
                if ticket.is_promised and receiver.failure:
                    # It is computed from its start, so the rest is of no use.
                    break
                flight.progress(receiver.received_bytes, receiver.whole_pages, course.last_block_bytes)
                self._promise_if_due(planned, receiver, switcher.admission, course.last_block_bytes)
                switcher.within_block()
        except PeerError as error:
            # What had arrived whole is still good.
            self._monitor.failed("fetch", error)
            outcome = error.reason
        finally:
            # A forward pass may be waiting for what is missing.
            receiver.end(ticket.cut_phase or outcome)
        fetched.choice = course.choice
        fetched.pages += receiver.whole_prefix()
        fetched.damaged += self._arrivals.keep(receiver, wanted, fetched.pages)
        if ticket.was_cut() and not receiver.failure:
            return OVERTAKEN
        return receiver.failure or ("cancelled" if ticket.is_cancelled else outcome)

    def _promise_if_due(
        self, planned: PlannedFetch, receiver: Receiver, admission: EarlyAdmission, last_block_bytes: int | None
    ) -> None:
        """Lets the request be admitted as soon as what is missing will be in time."""
        ticket, flight = planned.ticket, planned.flight
        if not self._admits_early or ticket.is_promised or receiver.failure:
            return
        received_bytes, now_s = receiver.received_bytes, time.monotonic()
        if not admission.is_worth_asking(received_bytes, now_s):
            return
        is_due = admission.is_due(received_bytes, self._pacer.knowledge(flight), now_s, last_block_bytes)
        if is_due and ticket.promise(receiver.promise()):
            flight.promised()
            metrics.EARLY_ADMISSIONS.inc()
            self._tracer.span(ticket.rid, "promise", now_s, now_s, received_bytes=received_bytes)
            self._on_promise()
