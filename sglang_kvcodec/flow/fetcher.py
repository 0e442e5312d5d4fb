"""Brings stored pages into host memory for requests that wait in the queue."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.cpus import take_place
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.flow.arrivals import Arrivals
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetch_endings import OVERTAKEN, FetchEndings
from sglang_kvcodec.flow.fetch_planning import FetchPlanning, PlannedFetch, what_is_known
from sglang_kvcodec.flow.fetch_queue import FetchQueue, turn_s
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.link_trials import LinkTrials
from sglang_kvcodec.flow.pacing import LOOKUP, Flight, Pacer, Stage
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.planner import LINK_TOO_SLOW
from sglang_kvcodec.flow.prediction import Prefix
from sglang_kvcodec.flow.prefix_fetch import Fetched, PrefixFetcher
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import PrefixLookup, Tier
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.tail_fetch import TailFetcher
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.flow.turning import turn
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

FETCH_THREADS = 8
LOOKUP_THREADS = 4


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
        tracer = tracer or Tracer()
        self._monitor = monitor
        self._page_tokens = transforms.spec.page_tokens
        self._config = config
        self._rates = rates
        self._always = config.plan == "always"
        admits_early = config.admit == "early"
        self._pacer = Pacer(functools.partial(what_is_known, rates, admits_early), is_watching=not self._always)
        self._prefixes = PrefixLookup(peer, stored, rates.link)
        self._planning = FetchPlanning(self._prefixes, self._pacer, config, self._page_tokens, tracer)
        transfers = Transfers(peer, rates.link, tracer)
        self._arrivals = Arrivals(peer, monitor, cache, stored, transforms, config.host_cache_bytes)
        self._trials = LinkTrials(rates.link, transfers, self._arrivals, monitor)
        self._prefix_fetcher = PrefixFetcher(
            transfers, self._arrivals, self._trials, self._pacer, monitor, tracer, admits_early, on_done
        )
        self._tail_fetcher = TailFetcher(transfers, self._arrivals, self._pacer)
        self._endings = FetchEndings(on_done)
        self._queue = FetchQueue()
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, "kvcodec-lookup", take_place)
        self._threads = ThreadPoolExecutor(FETCH_THREADS, "kvcodec-fetch", take_place)

    def start(
        self,
        tiers: Sequence[Tier],
        page_hashes: Sequence[bytes],
        tokens_before: int = 0,
        prompt_tokens: int | None = None,
        rid: str = "",
        may_compute: bool = False,
        are_others: bool = False,
    ) -> FetchTicket:
        """Begins to fetch; returns at once. The ticket may already be done.

        Args:
            tiers: in which pages may be stored, the best first.
            page_hashes: of the pages, in prefix order.
            tokens_before: of the prompt before the first of them, which are there already.
            prompt_tokens: of the whole prompt; None if it ends one token after them.
            rid: of the request, for the trace.
            may_compute: the model is free to compute the start of the prefix while the end is fetched.
            are_others: others use the model.
        """
        if prompt_tokens is None:
            prompt_tokens = tokens_before + len(page_hashes) * self._page_tokens + 1
        ticket = FetchTicket(page_hashes, tokens_before, prompt_tokens, rid, may_compute)
        reason = ""
        if not self._monitor.is_up:
            reason = "peer_down"
        elif len(page_hashes) * self._page_tokens < self._config.min_fetch_tokens:
            reason = "too_short"
        elif not self._queue.enter():
            reason = "overload"
        if reason:
            self._endings.end(ticket, reason)
        else:
            prefix = Prefix((), self._page_tokens, tokens_before, prompt_tokens)
            flight = Flight(Stage(LOOKUP, ticket.start_s, prefix), functools.partial(self._endings.overtaken, ticket))
            flight.may_turn = may_compute and not self._always
            flight.are_others = are_others
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

    def _run_lookup(self, ticket: FetchTicket, tiers: Sequence[Tier], flight: Flight) -> None:
        """Finds out what to do, and hands on what takes longer: nobody waits for a transfer to learn of none."""
        outcome, planned = "error", None
        try:
            outcome, planned = self._planning.prepare(ticket, tiers, flight)
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
        if planned.plan.pages:
            self._trials.found_fast()
        if planned.plan.first_page:
            self._begin_tail(planned)
        elif planned.plan.pages:
            flight.queued_bytes = sum(planned.prefix.page_bytes)
            turn = turn_s(ticket.start_s, flight.queued_bytes, self._rates.link.bytes_per_s())
            self._queue.put(turn, planned)
            self._threads.submit(self._run_next)
        elif planned.plan.reason == LINK_TOO_SLOW and not self._always:
            pages = self._trials.pages_to_try(planned.prefix.page_bytes)
            if pages:
                self._threads.submit(self._trials.run, planned.chosen, ticket.page_hashes[:pages])

    def _run_next(self) -> None:
        planned = self._queue.take()
        outcome, fetched = "error", Fetched()
        turned: tuple[PlannedFetch, Tail] | None = None
        try:
            outcome = self._prefix_fetcher.fetch(planned, fetched)
            # Before the request goes on: what it computes would else be taken for stored already, and not be published.
            self._arrivals.drop_damaged(fetched.damaged)
            if outcome == OVERTAKEN:
                turned = turn(planned, fetched, self._pacer.knowledge(planned.flight), self._config.min_fetch_tokens)
        except Exception:
            # A thread's top, as above.
            logger.exception("kvcodec: a fetch failed")
        if turned is None:
            self._over(planned.ticket, planned.flight, outcome, fetched.pages)
        else:
            self._start_tail(*turned, outcome, fetched.pages)
            self._run_tail(*turned)

    def _begin_tail(self, planned: PlannedFetch) -> None:
        """Lets the request go on without a page, and fetches the end of the prefix while it is computed."""
        plan = planned.plan
        tail = Tail(planned.prefix, plan.first_page, plan.pass_tokens)
        self._start_tail(planned, tail, plan.reason)
        self._threads.submit(self._run_tail, planned, tail)

    def _start_tail(self, planned: PlannedFetch, tail: Tail, outcome: str, pages: Sequence[PageObject] = ()) -> None:
        """Lets the request go on with ``pages``, or start a second time if it was promised more."""
        ticket = planned.ticket
        planned.flight.unwatched()
        if ticket.is_promised:
            ticket.second = ticket.again(tail)
        else:
            ticket.tail = tail
        if ticket.is_cancelled:
            tail.close()
        self._endings.end(ticket, outcome, pages)

    def _run_tail(self, planned: PlannedFetch, tail: Tail) -> None:
        damaged: list[PageKey] = []
        try:
            damaged = self._tail_fetcher.fetch(planned, tail)
        except PeerError as error:
            self._monitor.failed("fetch", error)
        except Exception:
            # A thread's top: the model computes what does not come.
            logger.exception("kvcodec: a fetch failed")
        finally:
            self._pacer.remove(planned.flight)
            self._queue.leave()
        self._arrivals.drop_damaged(damaged)

    def _over(self, ticket: FetchTicket, flight: Flight, outcome: str, pages: Sequence[PageObject] = ()) -> None:
        self._pacer.remove(flight)
        self._queue.leave()
        if pages:
            metrics.FETCH_SECONDS.observe(time.monotonic() - ticket.start_s)
        self._endings.end(ticket, outcome, pages)
