"""Brings stored pages into host memory for requests that wait in the queue."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.course import Course
from sglang_kvcodec.flow.early_admission import EarlyAdmission
from sglang_kvcodec.flow.exploring import Explorer
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.meeting import plan_meeting
from sglang_kvcodec.flow.pacing import FIRST_BYTE, LOOKUP, PROGRESS, Flight, Pacer, Stage
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.planner import (
    LINK_TOO_SLOW,
    Bounds,
    Choice,
    FetchPlan,
    Knowledge,
    Prefix,
    plan_tiers,
)
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.receiver import Receiver
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import PrefixLookup, StoredPrefix, Tier
from sglang_kvcodec.flow.switching import Switcher
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.tail_fetch import fetch_tail
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.exchange import FetchedMissing, FetchEvent, PeerTransport
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

MAX_TICKETS = 256
"""Requests that may fetch or wait to fetch at once; beyond it they are computed."""
FETCH_THREADS = 8
LOOKUP_THREADS = 4
OVERTAKEN = "overtaken"
"""Outcome of a fetch that was given up because computing had become faster."""


def turn_s(start_s: float, coded_bytes: float, bytes_per_s: float | None) -> float:
    """The turn of a fetch among those that wait for a thread; the least is first.

    The shortest is first, and a long one goes before all that come later than it takes itself, so none starves.
    """
    return start_s + coded_bytes / max(bytes_per_s, 1.0) if bytes_per_s is not None else start_s


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A fetch that waits for its turn.

    Attributes:
        prefixes: what is stored: the longest prefix, in each tier.
        choice: which of them to fetch.
        plan: how much of it.
        prefix: the pages that will be fetched; where that are none, those that are stored.
        at_s: when it was planned.
    """

    prefixes: Sequence[StoredPrefix]
    choice: int
    plan: FetchPlan
    prefix: Prefix
    at_s: float


class Fetcher:
    """Looks up, plans and fetches on threads of its own; whatever goes wrong shortens the prefix, never more."""

    def __init__(
        self,
        peer: PeerTransport,
        monitor: PeerMonitor,
        cache: BitstreamCache,
        stored: StoredPages,
        transforms: PageTransforms,
        config: ServerConfig,
        rates: Rates,
        on_done: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        """Starts with no fetch under way.

        Args:
            peer: where the pages are.
            monitor: knows whether it is there.
            cache: where fetched pages stay.
            stored: told what the peer has and has not.
            transforms: what can be restored here; says which pages are taken.
            config: bounds and time-outs.
            rates: what was measured; told what arrives.
            on_done: called after each ticket is done, on a thread of the fetcher.
            tracer: told what requests do here.
        """
        self._peer = peer
        self._monitor = monitor
        self._cache = cache
        self._stored = stored
        self._prefixes = PrefixLookup(peer, stored, rates.link)
        self._transforms = transforms
        self._page_tokens = transforms.spec.page_tokens
        self._config = config
        self._rates = rates
        self._on_done = on_done
        self._tracer = tracer or Tracer()
        self._transfers = Transfers(peer, rates.link, self._tracer)
        self._always = config.plan == "always"
        self._admits_early = config.admit == "early"
        self._pacer = Pacer(self._known, is_watching=not self._always)
        self._was_fetching: dict[int, bool] = {}
        """Magnitude of a stored prefix -> what was done with the last such one."""
        self._explorer = Explorer()
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, FetchTicket, _Planned, Flight]] = []
        """A heap of fetches for which no thread is free, by their turns."""
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="kvcodec-lookup")
        self._threads = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="kvcodec-fetch")
        self._lock = threading.Lock()
        self._tickets = 0

    def start(
        self,
        tiers: Sequence[Tier],
        page_hashes: Sequence[bytes],
        tokens_before: int = 0,
        prompt_tokens: int | None = None,
        rid: str = "",
        may_compute: bool = False,
    ) -> FetchTicket:
        """Begins to fetch; returns at once. The ticket may already be done.

        Args:
            tiers: in which pages may be stored, the best first.
            page_hashes: of the pages, in prefix order.
            tokens_before: of the prompt before the first of them, which are there already.
            prompt_tokens: of the whole prompt; None if it ends one token after them.
            rid: of the request, for the trace.
            may_compute: the model is free to compute the start of the prefix while the end is fetched.
        """
        if prompt_tokens is None:
            prompt_tokens = tokens_before + len(page_hashes) * self._page_tokens + 1
        ticket = FetchTicket(page_hashes, tokens_before, prompt_tokens, rid, may_compute)
        reason = ""
        if not self._monitor.is_up:
            reason = "peer_down"
        elif len(page_hashes) * self._page_tokens < self._config.min_fetch_tokens:
            reason = "too_short"
        else:
            with self._lock:
                if self._tickets >= MAX_TICKETS:
                    reason = "overload"
                else:
                    self._tickets += 1
        if reason:
            self._end(ticket, reason)
        else:
            prefix = Prefix((), self._page_tokens, tokens_before, prompt_tokens)
            flight = Flight(Stage(LOOKUP, ticket.start_s, prefix), functools.partial(self._overtaken, ticket))
            self._pacer.add(flight)
            self._lookups.submit(self._run_lookup, ticket, tuple(tiers), flight)
        return ticket

    def close(self) -> None:
        """Ends; the peer is to be closed first, which ends calls under way."""
        self._prefixes.close()
        # Before those that they hand on to.
        self._lookups.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pacer.close()

    def _known(self, profile_name: str = "") -> Knowledge:
        """What is known of a tier, or of all together."""
        rates = self._rates
        return Knowledge(
            rates.link.round_trip_s,
            rates.link.bytes_per_s(),
            (),
            rates.restore.model(profile_name=profile_name),
            rates.prefill.model(),
            self._admits_early,
        )

    def _run_lookup(self, ticket: FetchTicket, tiers: Sequence[Tier], flight: Flight) -> None:
        """Finds out what to do, and hands on what takes longer: nobody waits for a transfer to learn of none."""
        outcome, planned = "error", None
        try:
            outcome, planned = self._prepare(ticket, tiers, flight)
        except PeerError as error:
            self._monitor.failed("fetch", error)
            outcome = error.reason
        except Exception:
            # A thread's top: whatever it is, the request must go on by prefill.
            logger.exception("kvcodec: a lookup failed")
        if planned is None or not planned.plan.pages:
            self._over(ticket, flight, outcome)
        if planned is None:
            return
        if planned.plan.first_page:
            self._begin_tail(ticket, planned, flight)
        elif planned.plan.pages:
            turn = turn_s(ticket.start_s, sum(planned.prefix.page_bytes), self._rates.link.bytes_per_s())
            with self._lock:
                heapq.heappush(self._waiting, (turn, next(self._order), ticket, planned, flight))
            self._threads.submit(self._run_next)
        elif planned.plan.reason == LINK_TOO_SLOW and not self._always:
            pages_to_try = self._explorer.pages(self._rates.link.age_s, planned.prefix.page_bytes)
            if pages_to_try:
                stored = planned.prefixes[planned.choice]
                self._threads.submit(self._explore, stored, ticket.page_hashes[:pages_to_try])

    def _run_next(self) -> None:
        with self._lock:
            _, _, ticket, planned, flight = heapq.heappop(self._waiting)
        outcome = "error"
        pages: list[PageObject] = []
        damaged: list[PageKey] = []
        try:
            outcome = self._fetch(ticket, planned, flight, pages, damaged)
            # Before the request goes on: what it computes would else be taken for stored already, and not be published.
            for key in damaged:
                self._drop_damaged(key)
        except Exception:
            # A thread's top, as above.
            logger.exception("kvcodec: a fetch failed")
        finally:
            self._over(ticket, flight, outcome, pages)

    def _begin_tail(self, ticket: FetchTicket, planned: _Planned, flight: Flight) -> None:
        """Lets the request go on without a page, and fetches the end of the prefix while it is computed."""
        flight.unwatched()
        tail = ticket.tail = Tail(planned.prefix, planned.plan.first_page, planned.plan.pass_tokens)
        if ticket.is_cancelled:
            tail.close()
        self._end(ticket, planned.plan.reason)
        self._threads.submit(self._run_tail, ticket, tail, planned, flight)

    def _run_tail(self, ticket: FetchTicket, tail: Tail, planned: _Planned, flight: Flight) -> None:
        damaged: list[PageKey] = []
        try:
            damaged = fetch_tail(
                tail,
                planned.prefixes[planned.choice].namespaces,
                ticket.page_hashes,
                functools.partial(self._pacer.knowledge, flight),
                self._transfers,
                self._new_receiver,
                self._settle,
                flight,
                ticket.rid,
                self._deadline_s(ticket),
            )
        except PeerError as error:
            self._monitor.failed("fetch", error)
        except Exception:
            # A thread's top: the model computes what does not come.
            logger.exception("kvcodec: a fetch failed")
        finally:
            self._pacer.remove(flight)
            with self._lock:
                self._tickets -= 1
        for key in damaged:
            self._drop_damaged(key)

    def _over(self, ticket: FetchTicket, flight: Flight, outcome: str, pages: Sequence[PageObject] = ()) -> None:
        self._pacer.remove(flight)
        with self._lock:
            self._tickets -= 1
        if pages:
            metrics.FETCH_SECONDS.observe(time.monotonic() - ticket.start_s)
        self._end(ticket, outcome, pages)

    def _overtaken(self, ticket: FetchTicket, phase: str) -> None:
        """Computing is faster than what is left of the fetch; called on the pacer's thread."""
        if ticket.is_cancelled:
            return
        logger.debug("kvcodec: a fetch is given up in phase %s: computing is faster by now", phase)
        if phase == PROGRESS:
            metrics.FETCH_CUTS.labels(phase=phase).inc()
            ticket.cut(phase)
        elif ticket.abandon(phase):
            metrics.FETCH_CUTS.labels(phase=phase).inc()
            self._finish(ticket, OVERTAKEN)

    def _end(self, ticket: FetchTicket, outcome: str, pages: Sequence[PageObject] = ()) -> None:
        if ticket.settle(pages):
            self._finish(ticket, outcome)

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

    def _deadline_s(self, ticket: FetchTicket) -> float:
        return ticket.start_s + self._config.timeouts.fetch_s

    def _prepare(self, ticket: FetchTicket, tiers: Sequence[Tier], flight: Flight) -> tuple[str, _Planned | None]:
        """Looks up and plans; why it ended here if it does, and the plan if there is one."""
        if ticket.is_cancelled or ticket.was_cut():
            return "cancelled", None
        start_s = time.monotonic()
        if start_s > self._deadline_s(ticket):
            return "too_slow", None
        self._tracer.span(ticket.rid, "lookup queue", ticket.start_s, start_s)
        prefixes = self._prefixes.find(tiers, ticket.page_hashes)
        covered_pages = max(prefix.pages for prefix in prefixes)
        ticket.stored_pages = covered_pages
        asked_pages = len(ticket.page_hashes)
        self._tracer.span(
            ticket.rid, "lookup", start_s, time.monotonic(), asked_pages=asked_pages, stored_pages=covered_pages
        )
        metrics.LOOKUP_PAGES.labels(outcome="stored").inc(covered_pages)
        metrics.LOOKUP_PAGES.labels(outcome="missing").inc(asked_pages - covered_pages)
        if ticket.was_cut():
            return OVERTAKEN, None
        choice, plan, prefix = self._plan(ticket, prefixes, flight)
        if plan.pages:
            self._explorer.found_fast()
            prefix = dataclasses.replace(prefix, page_bytes=prefix.page_bytes[: plan.pages])
        return plan.reason, _Planned(prefixes, choice, plan, prefix, time.monotonic())

    def _fetch(
        self,
        ticket: FetchTicket,
        planned: _Planned,
        flight: Flight,
        pages: list[PageObject],
        damaged: list[PageKey],
    ) -> str:
        """Fetches what was planned; why it ended. Appends the pages that can be used, and those that can't."""
        deadline_s = self._deadline_s(ticket)
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
        course = Course(planned.prefixes, planned.choice, len(wanted))
        receiver = self._receiver(course, wanted)
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
            for event in self._events(course, wanted, ticket.stop, flight, ticket.rid, switcher.before_block):
                receiver.add(event)
                if receiver.is_complete:
                    break
                if ticket.has_gone_on() and self._explorer.is_enough(self._rates.link.age_s, ticket.start_s):
                    break
                if time.monotonic() > deadline_s:
                    outcome = "too_slow"
                    break
                if ticket.is_promised and receiver.failure:
                    # It is computed from its start, so the rest is of no use.
                    break
                flight.progress(receiver.received_bytes, receiver.whole_pages)
                self._promise_if_due(ticket, receiver, flight, switcher.admission)
                switcher.within_block()
        except PeerError as error:
            # What had arrived whole is still good.
            self._monitor.failed("fetch", error)
            outcome = error.reason
        finally:
            # A forward pass may be waiting for what is missing.
            receiver.end(ticket.cut_phase or outcome)
        pages += receiver.whole_prefix()
        self._settle(receiver, wanted, pages, damaged)
        if ticket.was_cut() and not receiver.failure:
            return OVERTAKEN
        return receiver.failure or ("cancelled" if ticket.is_cancelled else outcome)

    def _promise_if_due(
        self, ticket: FetchTicket, receiver: Receiver, flight: Flight, admission: EarlyAdmission
    ) -> None:
        """Lets the request be admitted as soon as what is missing will be in time."""
        if not self._admits_early or ticket.is_promised or receiver.failure:
            return
        received_bytes, now_s = receiver.received_bytes, time.monotonic()
        if not admission.is_worth_asking(received_bytes, now_s):
            return
        is_due = admission.is_due(received_bytes, self._pacer.knowledge(flight), now_s)
        if is_due and ticket.promise(receiver.promise()):
            flight.promised()
            metrics.EARLY_ADMISSIONS.inc()
            self._tracer.span(ticket.rid, "promise", now_s, now_s, received_bytes=received_bytes)
            self._on_done()

    def _plan(
        self, ticket: FetchTicket, prefixes: Sequence[StoredPrefix], flight: Flight
    ) -> tuple[int, FetchPlan, Prefix]:
        """Which of the stored prefixes, the plan, and what is stored of it."""
        bounds = Bounds(self._config.min_fetch_tokens, self._config.host_cache_bytes)
        magnitude = max(prefix.pages for prefix in prefixes).bit_length()
        was_fetching = self._was_fetching.get(magnitude, True)
        choices = [
            Choice(
                Prefix(stored.page_bytes, self._page_tokens, ticket.tokens_before, ticket.prompt_tokens),
                self._pacer.knowledge(flight, stored.profile_name if len(prefixes) > 1 else ""),
            )
            for stored in prefixes
        ]
        choice, plan = plan_tiers(choices, bounds, was_fetching, self._always)
        if ticket.may_compute and not self._always:
            choice, plan = plan_meeting(choices, choice, plan, bounds)
        prefix = choices[choice].prefix
        plan = dataclasses.replace(plan, tier=prefixes[choice].profile_name)
        flight.profile_name = plan.tier if len(prefixes) > 1 else ""
        if plan.prefill_s is not None:
            self._was_fetching[magnitude] = plan.pages > 0
        metrics.PLANS.labels(reason=plan.reason).inc()
        if plan.pages:
            metrics.PLANNED_TIERS.labels(tier=plan.tier).inc()
        logger.debug("kvcodec: %s: %s", plan.reason, plan.words)
        now_s = time.monotonic()
        self._tracer.span(ticket.rid, "plan", now_s, now_s, **dataclasses.asdict(plan))
        ticket.plan = plan
        return choice, plan, prefix

    def _receiver(self, course: Course, wanted: Sequence[bytes]) -> Receiver:
        keys = [PageKey(*place) for place in zip(course.namespaces, wanted, strict=True)]
        return self._new_receiver(keys, course.page_bytes)

    def _new_receiver(self, keys: Sequence[PageKey], page_bytes: Sequence[int]) -> Receiver:
        return Receiver(keys, self._transforms, self._config.host_cache_bytes, page_bytes)

    def _settle(
        self, receiver: Receiver, wanted: Sequence[bytes], pages: Sequence[PageObject], damaged: list[PageKey]
    ) -> None:
        """Keeps what is good and remembers what is not."""
        for page_hash, page in reversed(list(zip(wanted, pages, strict=False))):
            self._cache.put(page_hash, page)
        for key in receiver.gone:
            self._stored.update(key.namespace_digest, [key.page_hash], [False])
        damaged += receiver.damaged

    def _events(
        self,
        course: Course,
        wanted: Sequence[bytes],
        stop: threading.Event,
        flight: Flight | None = None,
        rid: str = "explorations",
        before_block: Callable[[int], None] = lambda first: None,
    ) -> Iterator[tuple[int, FetchEvent]]:
        """The events of fetches of one block of pages after another, each with the index of its block's first page.

        A block takes ``BLOCK_S`` at most: as a peer sends layer group after layer group, a transfer that ends early
        leaves whole pages of the blocks before only. The last one is larger.
        Where the course is switched, the next block begins at once, and the stream that was under way ends.
        """
        first = 0
        while first < len(wanted) and not stop.is_set():
            before_block(first)
            course.take_restart()
            link = self._rates.link
            pages = course.block(first, link.bytes_per_s(), SEGMENT_PAGES, link.round_trip_s)
            block = wanted[first : first + pages]
            restart: int | None = None
            events = self._transfers.events(course.namespaces[first], block, stop, rid)
            try:
                for event in events:
                    if flight is not None and flight.phase != PROGRESS and not isinstance(event, FetchedMissing):
                        flight.begin(PROGRESS, time.monotonic())
                    yield first, event
                    if (restart := course.take_restart()) is not None:
                        break
            finally:
                events.close()
            first = first + len(block) if restart is None else restart

    def _explore(self, stored: StoredPrefix, wanted: Sequence[bytes]) -> None:
        """Fetches a little that nobody waits for, to see whether the link has become fast."""
        if not self._explorer.begin():
            return
        damaged: list[PageKey] = []
        try:
            metrics.EXPLORATIONS.inc()
            start_s = time.monotonic()
            course = Course([stored], 0, len(wanted))
            receiver = self._receiver(course, wanted)
            for event in self._events(course, wanted, threading.Event()):
                receiver.add(event)
                if receiver.is_complete or self._explorer.is_enough(self._rates.link.age_s, start_s):
                    break
            self._settle(receiver, wanted, receiver.whole_prefix(), damaged)
        except PeerError as error:
            self._monitor.failed("fetch", error)
        except Exception:
            # A thread's top.
            logger.exception("kvcodec: a link was not measured")
        finally:
            self._explorer.end()
        for key in damaged:
            self._drop_damaged(key)

    def _drop_damaged(self, key: PageKey) -> None:
        """A page that can't be read stands in the way of a good copy of it: the peer keeps what it has."""
        self._stored.update(key.namespace_digest, [key.page_hash], [False])
        try:
            self._peer.delete(key.namespace_digest, [key.page_hash])
        except PeerError as error:
            self._monitor.failed("delete", error)
