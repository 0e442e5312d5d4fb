"""Brings stored pages into host memory for requests that wait in the queue."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import FormatError, PeerError, PeerRejectedError
from sglang_kvcodec.flow.assembly import PageAssembly
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.exploring import Explorer
from sglang_kvcodec.flow.pacing import FIRST_BYTE, LOOKUP, PROGRESS, Flight, Pacer, Stage
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.planner import (
    CUT_TO_HOST_MEMORY,
    LINK_TOO_SLOW,
    Bounds,
    FetchPlan,
    Knowledge,
    Prefix,
    plan_fetch,
)
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing, FetchEvent, PeerTransport
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

MAX_TICKETS = 256
"""Requests that may fetch or wait to fetch at once; beyond it they are computed."""
FETCH_THREADS = 8
MAX_RUNS = 4
"""Changes of namespace within one prefix: each costs a Lookup and a Fetch."""
BLOCK_S = 0.5
FIRST_BLOCK_BYTES = 4 << 20
"""Of a block of pages, while the link's bandwidth is not known."""
OVERTAKEN = "overtaken"
"""Outcome of a fetch that was given up because computing had become faster."""


class FetchTicket:
    """One request's fetch. Its fields may be read by any thread once :attr:`is_done`."""

    def __init__(
        self, page_hashes: Sequence[bytes], tokens_before: int = 0, prompt_tokens: int = 0, rid: str = ""
    ) -> None:
        """A fetch of ``page_hashes``, in prefix order, for a prompt with so many tokens before them and in all."""
        self.rid = rid
        self.page_hashes = tuple(page_hashes)
        self.tokens_before = tokens_before
        self.prompt_tokens = prompt_tokens
        self.start_s = time.monotonic()
        self.pages: list[PageObject] = []
        """The pages that arrived: an unbroken prefix of ``page_hashes``. Held as long as the ticket is."""
        self.stored_pages = len(self.page_hashes)
        """How long a prefix the peer has; that it has all is the guess until it was asked."""
        self.plan: FetchPlan | None = None
        """What was planned, once it was."""
        self.cut_phase = ""
        """The phase in which computing overtook the fetch, if it did."""
        self.stop = threading.Event()
        """Ends the transfer."""
        self._is_settled = False
        self._is_measuring = False
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done.is_set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def was_cut(self) -> bool:
        """Whether computing has overtaken it."""
        return bool(self.cut_phase)

    def has_gone_on(self) -> bool:
        """Whether the request has gone on without it, while it still learns."""
        return self._is_measuring

    @property
    def most_pages(self) -> int:
        """More than these will not come."""
        if self.is_done:
            return len(self.pages)
        plan = self.plan
        return len(self.page_hashes) if plan is None else plan.pages

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled.set()
        with self._lock:
            if not self._is_measuring:
                self.stop.set()

    def cut(self, phase: str) -> None:
        """Computing is faster: ends the transfer with what has arrived whole."""
        self.cut_phase = phase
        self.stop.set()

    def abandon(self, phase: str) -> bool:
        """Computing is faster, and nothing has arrived: as :meth:`settle` without a page.

        What is under way may go on, to learn how slow it is.
        """
        with self._lock:
            if self._is_settled:
                return False
            self.cut_phase = phase
            self._is_settled = self._is_measuring = True
            return True

    def settle(self, pages: Sequence[PageObject]) -> bool:
        """Nothing more will arrive but ``pages``. Whether that was not settled before; then :meth:`finish` follows."""
        with self._lock:
            if self._is_settled:
                return False
            self.pages = list(pages)
            self._is_settled = True
            return True

    def finish(self) -> None:
        """Lets others read it."""
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Waits for :attr:`is_done`; for tests."""
        return self._done.wait(timeout_s)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Stored pages that follow each other and lie in one namespace.

    Attributes:
        namespace_digest: the namespace.
        first: index of the first of them in the prefix.
        pages: how many.
        coded_bytes: their size.
    """

    namespace_digest: bytes
    first: int
    pages: int
    coded_bytes: int

    @property
    def page_bytes(self) -> list[int]:
        """The size of each; they are about equal, and the peer tells the sum."""
        return [
            self.coded_bytes * (i + 1) // self.pages - self.coded_bytes * i // self.pages for i in range(self.pages)
        ]


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
        self._transforms = transforms
        self._page_tokens = transforms.spec.page_tokens
        self._config = config
        self._rates = rates
        self._on_done = on_done
        self._tracer = tracer or Tracer()
        self._always = config.plan == "always"
        self._pacer = Pacer(self._known, is_watching=not self._always)
        self._was_fetching: dict[int, bool] = {}
        """Magnitude of a stored prefix -> what was done with the last such one."""
        self._explorer = Explorer()
        self._threads = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="kvcodec-fetch")
        self._lock = threading.Lock()
        self._tickets = 0

    def start(
        self,
        namespace_digests: Sequence[bytes],
        page_hashes: Sequence[bytes],
        tokens_before: int = 0,
        prompt_tokens: int | None = None,
        rid: str = "",
    ) -> FetchTicket:
        """Begins to fetch; returns at once. The ticket may already be done.

        Args:
            namespace_digests: where pages may be, the best first: pages of the others are taken where it has none.
            page_hashes: of the pages, in prefix order.
            tokens_before: of the prompt before the first of them, which are there already.
            prompt_tokens: of the whole prompt; None if it ends one token after them.
            rid: of the request, for the trace.
        """
        if prompt_tokens is None:
            prompt_tokens = tokens_before + len(page_hashes) * self._page_tokens + 1
        ticket = FetchTicket(page_hashes, tokens_before, prompt_tokens, rid)
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
            self._threads.submit(self._run, ticket, tuple(namespace_digests), flight)
        return ticket

    def close(self) -> None:
        """Ends; the peer is to be closed first, which ends calls under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pacer.close()

    def _known(self) -> Knowledge:
        rates = self._rates
        return Knowledge(
            rates.link.round_trip_s, rates.link.bytes_per_s(), (), rates.restore.model(), rates.prefill.model()
        )

    def _run(self, ticket: FetchTicket, namespace_digests: Sequence[bytes], flight: Flight) -> None:
        outcome = "error"
        pages: list[PageObject] = []
        damaged: list[PageKey] = []
        try:
            outcome = self._fetch(ticket, namespace_digests, flight, pages, damaged)
        except PeerError as error:
            self._monitor.failed("fetch", error)
            outcome = error.reason
        except Exception:
            # A thread's top: whatever it is, the request must go on by prefill.
            logger.exception("kvcodec: a fetch failed")
        finally:
            self._pacer.remove(flight)
            with self._lock:
                self._tickets -= 1
            if pages:
                metrics.FETCH_SECONDS.observe(time.monotonic() - ticket.start_s)
            self._end(ticket, outcome, pages)
        # Last: the request does not wait for it.
        for key in damaged:
            self._drop_damaged(key)

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
        unused = ticket.stored_pages - len(ticket.pages)
        if unused:
            metrics.MISSES.labels(reason=outcome).inc(unused)
        not_stored = len(ticket.page_hashes) - ticket.stored_pages
        if not_stored:
            metrics.MISSES.labels(reason="not_stored").inc(not_stored)
        ticket.finish()
        self._on_done()

    def _fetch(
        self,
        ticket: FetchTicket,
        namespace_digests: Sequence[bytes],
        flight: Flight,
        pages: list[PageObject],
        damaged: list[PageKey],
    ) -> str:
        """Fetches what is worth it; why it ended. Appends the pages that can be used, and those that can't."""
        deadline_s = ticket.start_s + self._config.timeouts.fetch_s
        if ticket.is_cancelled or ticket.was_cut():
            return "cancelled"
        if time.monotonic() > deadline_s:
            return "too_slow"
        start_s = time.monotonic()
        self._tracer.span(ticket.rid, "fetch queue", ticket.start_s, start_s)
        runs = self._lookup(namespace_digests, ticket.page_hashes)
        covered_pages = sum(run.pages for run in runs)
        ticket.stored_pages = covered_pages
        asked_pages = len(ticket.page_hashes)
        self._tracer.span(
            ticket.rid, "lookup", start_s, time.monotonic(), asked_pages=asked_pages, stored_pages=covered_pages
        )
        metrics.LOOKUP_PAGES.labels(outcome="stored").inc(covered_pages)
        metrics.LOOKUP_PAGES.labels(outcome="missing").inc(asked_pages - covered_pages)
        if ticket.was_cut():
            return OVERTAKEN
        plan, prefix = self._plan(ticket, runs, flight)
        if plan.pages == 0:
            # The request goes on; what follows is for the next ones.
            self._end(ticket, plan.reason)
            if plan.reason == LINK_TOO_SLOW and not self._always:
                pages_to_try = self._explorer.pages(self._rates.link.age_s, prefix.page_bytes)
                if pages_to_try:
                    self._explore(runs, ticket.page_hashes[:pages_to_try], damaged)
            return plan.reason
        self._explorer.found_fast()
        outcome = plan.reason
        wanted = ticket.page_hashes[: plan.pages]
        receiver = self._receiver(runs, wanted)
        flight.begin(
            FIRST_BYTE, time.monotonic(), dataclasses.replace(prefix, page_bytes=prefix.page_bytes[: plan.pages])
        )
        try:
            for event in self._events(runs, wanted, ticket.stop, flight, ticket.rid):
                receiver.add(event)
                if receiver.is_complete:
                    break
                if ticket.has_gone_on() and self._explorer.is_enough(self._rates.link.age_s, ticket.start_s):
                    break
                if time.monotonic() > deadline_s:
                    outcome = "too_slow"
                    break
                flight.progress(receiver.received_bytes, receiver.whole_pages)
        except PeerError as error:
            # What had arrived whole is still good.
            self._monitor.failed("fetch", error)
            outcome = error.reason
        pages += receiver.whole_prefix()
        self._settle(receiver, wanted, pages, damaged)
        if ticket.was_cut() and not receiver.failure:
            return OVERTAKEN
        return receiver.failure or ("cancelled" if ticket.is_cancelled else outcome)

    def _plan(self, ticket: FetchTicket, runs: Sequence[_Run], flight: Flight) -> tuple[FetchPlan, Prefix]:
        """The plan, and what is stored."""
        sizes = [size for run in runs for size in run.page_bytes]
        prefix = Prefix(sizes, self._page_tokens, ticket.tokens_before, ticket.prompt_tokens)
        bounds = Bounds(self._config.min_fetch_tokens, self._config.host_cache_bytes)
        magnitude = len(sizes).bit_length()
        was_fetching = self._was_fetching.get(magnitude, True)
        plan = plan_fetch(prefix, self._pacer.knowledge(flight), bounds, was_fetching, self._always)
        if plan.prefill_s is not None:
            self._was_fetching[magnitude] = plan.pages > 0
        metrics.PLANS.labels(reason=plan.reason).inc()
        logger.debug("kvcodec: %s: %s", plan.reason, plan.words)
        now_s = time.monotonic()
        self._tracer.span(ticket.rid, "plan", now_s, now_s, **dataclasses.asdict(plan))
        ticket.plan = plan
        return plan, prefix

    def _receiver(self, runs: Sequence[_Run], wanted: Sequence[bytes]) -> _Receiver:
        places = [run.namespace_digest for run in runs for _ in range(run.pages)]
        keys = [PageKey(*place) for place in zip(places, wanted, strict=False)]
        return _Receiver(keys, self._transforms, self._config.host_cache_bytes)

    def _settle(
        self, receiver: _Receiver, wanted: Sequence[bytes], pages: Sequence[PageObject], damaged: list[PageKey]
    ) -> None:
        """Keeps what is good and remembers what is not."""
        for page_hash, page in reversed(list(zip(wanted, pages, strict=False))):
            self._cache.put(page_hash, page)
        for key in receiver.gone:
            self._stored.update(key.namespace_digest, [key.page_hash], [False])
        damaged += receiver.damaged

    def _events(
        self,
        runs: Sequence[_Run],
        wanted: Sequence[bytes],
        stop: threading.Event,
        flight: Flight | None = None,
        rid: str = "explorations",
    ) -> Iterator[tuple[int, FetchEvent]]:
        """The events of fetches of one block of pages after another, each with the index of its block's first page.

        A block takes about :data:`BLOCK_S`: as a peer sends layer group after layer group, a transfer that ends early
        leaves whole pages of the blocks before only.
        """
        for run in runs:
            first = run.first
            while first < min(run.first + run.pages, len(wanted)) and not stop.is_set():
                bytes_per_s = self._rates.link.bytes_per_s()
                block_bytes = FIRST_BLOCK_BYTES if bytes_per_s is None else bytes_per_s * BLOCK_S
                pages = max(1, int(block_bytes * run.pages / max(1, run.coded_bytes)))
                block = wanted[first : min(first + pages, run.first + run.pages)]
                transfer = self._rates.link.transfer()
                start_s, received_bytes = time.monotonic(), 0
                try:
                    for event in self._peer.fetch(run.namespace_digest, block, stop):
                        if not isinstance(event, FetchedMissing):
                            if flight is not None and flight.phase != PROGRESS:
                                flight.begin(PROGRESS, time.monotonic())
                            transfer.received(_bytes_of(event))
                            received_bytes += _bytes_of(event)
                        yield first, event
                finally:
                    transfer.end()
                    self._traced(rid, start_s, received_bytes, len(block))
                first += len(block)

    def _traced(self, rid: str, start_s: float, received_bytes: int, pages: int) -> None:
        self._tracer.span(rid, "wire", start_s, time.monotonic(), bytes=received_bytes, pages=pages)
        self._tracer.counter("link", bytes_per_s=self._rates.link.bytes_per_s() or 0.0)

    def _explore(self, runs: Sequence[_Run], wanted: Sequence[bytes], damaged: list[PageKey]) -> None:
        """Fetches a little that nobody waits for, to see whether the link has become fast."""
        if not self._explorer.begin():
            return
        try:
            metrics.EXPLORATIONS.inc()
            start_s = time.monotonic()
            receiver = self._receiver(runs, wanted)
            for event in self._events(runs, wanted, threading.Event()):
                receiver.add(event)
                if receiver.is_complete or self._explorer.is_enough(self._rates.link.age_s, start_s):
                    break
            self._settle(receiver, wanted, receiver.whole_prefix(), damaged)
        finally:
            self._explorer.end()

    def _lookup(self, namespace_digests: Sequence[bytes], page_hashes: Sequence[bytes]) -> list[_Run]:
        """The longest stored prefix. Where a namespace has no more of it, the others are asked for what follows."""
        runs: list[_Run] = []
        found = True
        while found and len(runs) < MAX_RUNS:
            first = runs[-1].first + runs[-1].pages if runs else 0
            rest = page_hashes[first:]
            exhausted = runs[-1].namespace_digest if runs else b""
            found = False
            for namespace_digest in namespace_digests:
                if not rest or namespace_digest == exhausted:
                    continue
                start_s = time.monotonic()
                lookup = self._peer.lookup(namespace_digest, rest)
                self._rates.link.round_trip(time.monotonic() - start_s)
                self._stored.update(namespace_digest, rest, lookup.present)
                if lookup.covered_pages:
                    runs.append(_Run(namespace_digest, first, lookup.covered_pages, lookup.covered_bytes))
                    found = True
                    break
        return runs

    def _drop_damaged(self, key: PageKey) -> None:
        """A page that can't be read stands in the way of a good copy of it: the peer keeps what it has."""
        self._stored.update(key.namespace_digest, [key.page_hash], [False])
        try:
            self._peer.delete(key.namespace_digest, [key.page_hash])
        except PeerError as error:
            self._monitor.failed("delete", error)


def _bytes_of(event: FetchedHeader | FetchedFragment) -> int:
    return len(event.header) if isinstance(event, FetchedHeader) else len(event.data)


class _Receiver:
    """Turns the events of one fetch into pages; a bad page ends the prefix there."""

    def __init__(self, keys: Sequence[PageKey], transforms: PageTransforms, max_bytes: int) -> None:
        self._keys = keys
        self._transforms = transforms
        self._assemblies: dict[int, PageAssembly] = {}
        self._pages: dict[int, PageObject] = {}
        self._usable = len(keys)
        self._free_bytes = max_bytes
        self._whole = 0
        self.received_bytes = 0
        self.damaged: list[PageKey] = []
        self.gone: list[PageKey] = []
        self.failure = ""

    @property
    def is_complete(self) -> bool:
        return len(self._pages) >= self._usable

    @property
    def whole_pages(self) -> int:
        """Length of :meth:`whole_prefix`."""
        while self._whole in self._pages:
            self._whole += 1
        return min(self._whole, self._usable)

    def add(self, placed: tuple[int, FetchEvent]) -> None:
        """Takes an event, and the index of the first page of the fetch that it is of."""
        first, event = placed
        index = first + event.page_index
        if not isinstance(event, FetchedMissing):
            self.received_bytes += _bytes_of(event)
        if index >= self._usable or index in self._pages:
            return
        if isinstance(event, FetchedMissing):
            self.gone.append(self._keys[index])
            self._cut(index, "gone")
            return
        try:
            if isinstance(event, FetchedHeader):
                metrics.FETCHED_BYTES.inc(len(event.header))
                if event.object_bytes > self._free_bytes:
                    self._cut(index, CUT_TO_HOST_MEMORY)
                    return
                self._free_bytes -= event.object_bytes
                self._assemblies[index] = PageAssembly(self._keys[index], self._transforms, event)
                page = self._assemblies[index].finish()
            else:
                metrics.FETCHED_BYTES.inc(len(event.data))
                assembly = self._assemblies.get(index)
                if assembly is None:
                    raise PeerRejectedError(f"page {self._keys[index]}: the peer sends bytes before the header")
                page = assembly.add(event)
        except FormatError as error:
            logger.warning("kvcodec: stored page %s can't be used: %s", self._keys[index], error)
            self.damaged.append(self._keys[index])
            self._cut(index, error.reason)
            return
        if page is not None:
            self._pages[index] = page
            del self._assemblies[index]

    def _cut(self, index: int, reason: str) -> None:
        """Pages from ``index`` on are of no use."""
        self._usable = index
        self.failure = reason
        for i in [i for i in self._assemblies if i >= index]:
            del self._assemblies[i]
        for i in [i for i in self._pages if i >= index]:
            del self._pages[i]

    def whole_prefix(self) -> list[PageObject]:
        pages: list[PageObject] = []
        while len(pages) in self._pages:
            pages.append(self._pages[len(pages)])
        return pages
