"""Brings stored pages into host memory for requests that wait in the queue."""

from __future__ import annotations

import dataclasses
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
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.planner import CUT_TO_HOST_MEMORY, plan_fetch
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import FetchedHeader, FetchedMissing, FetchEvent, PeerTransport
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

MAX_TICKETS = 256
"""Requests that may fetch or wait to fetch at once; beyond it they are computed."""
FETCH_THREADS = 8
MAX_RUNS = 4
"""Changes of namespace within one prefix: each costs a Lookup and a Fetch."""


class FetchTicket:
    """One request's fetch. Its fields may be read by any thread once :attr:`is_done`."""

    def __init__(self, page_hashes: Sequence[bytes]) -> None:
        """A fetch of ``page_hashes``, in prefix order."""
        self.page_hashes = tuple(page_hashes)
        self.pages: list[PageObject] = []
        """The pages that arrived: an unbroken prefix of ``page_hashes``. Held as long as the ticket is."""
        self.stored_pages = len(self.page_hashes)
        """How long a prefix the peer has; that it has all is the guess until it was asked."""
        self.cancelled = threading.Event()
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done.is_set()

    def finish(self) -> None:
        """Nothing more will arrive."""
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
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts with no fetch under way.

        Args:
            peer: where the pages are.
            monitor: knows whether it is there.
            cache: where fetched pages stay.
            stored: told what the peer has and has not.
            transforms: what can be restored here; says which pages are taken.
            config: bounds and time-outs.
            on_done: called after each ticket is done, on a fetch thread.
        """
        self._peer = peer
        self._monitor = monitor
        self._cache = cache
        self._stored = stored
        self._transforms = transforms
        self._page_tokens = transforms.spec.page_tokens
        self._config = config
        self._on_done = on_done
        self._threads = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="kvcodec-fetch")
        self._lock = threading.Lock()
        self._tickets = 0

    def start(self, namespace_digests: Sequence[bytes], page_hashes: Sequence[bytes]) -> FetchTicket:
        """Begins to fetch; returns at once. The ticket may already be done.

        Args:
            namespace_digests: where pages may be, the best first: pages of the others are taken where it has none.
            page_hashes: of the pages, in prefix order.
        """
        ticket = FetchTicket(page_hashes)
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
            self._threads.submit(self._run, ticket, tuple(namespace_digests), time.monotonic())
        return ticket

    def close(self) -> None:
        """Ends; the peer is to be closed first, which ends calls under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, ticket: FetchTicket, namespace_digests: Sequence[bytes], start_s: float) -> None:
        outcome = "error"
        damaged: list[PageKey] = []
        try:
            outcome = self._fetch(ticket, namespace_digests, start_s, damaged)
        except PeerError as error:
            self._monitor.failed("fetch", error)
            outcome = error.reason
        except Exception:
            # A thread's top: whatever it is, the request must go on by prefill.
            logger.exception("kvcodec: a fetch failed")
        finally:
            with self._lock:
                self._tickets -= 1
            if ticket.pages:
                metrics.FETCH_SECONDS.observe(time.monotonic() - start_s)
            self._end(ticket, outcome)
        # Last: the request does not wait for it.
        for key in damaged:
            self._drop_damaged(key)

    def _end(self, ticket: FetchTicket, outcome: str) -> None:
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
        self, ticket: FetchTicket, namespace_digests: Sequence[bytes], start_s: float, damaged: list[PageKey]
    ) -> str:
        """Fetches what is worth it into the ticket; why it ended. Appends the pages that can't be used."""
        deadline_s = start_s + self._config.timeouts.fetch_s
        if ticket.cancelled.is_set():
            return "cancelled"
        if time.monotonic() > deadline_s:
            return "too_slow"
        runs = self._lookup(namespace_digests, ticket.page_hashes)
        covered_pages = sum(run.pages for run in runs)
        ticket.stored_pages = covered_pages
        metrics.LOOKUP_PAGES.labels(outcome="stored").inc(covered_pages)
        metrics.LOOKUP_PAGES.labels(outcome="missing").inc(len(ticket.page_hashes) - covered_pages)
        plan = plan_fetch(
            covered_pages,
            sum(run.coded_bytes for run in runs),
            self._page_tokens,
            self._config.min_fetch_tokens,
            self._config.host_cache_bytes,
        )
        logger.debug("kvcodec: %d of %d pages: %s", plan.pages, len(ticket.page_hashes), plan.reason)
        if plan.pages == 0:
            return plan.reason
        wanted = ticket.page_hashes[: plan.pages]
        places = [run.namespace_digest for run in runs for _ in range(run.pages)]
        keys = [PageKey(*place) for place in zip(places, wanted, strict=False)]
        receiver = _Receiver(keys, self._transforms, self._config.host_cache_bytes)
        outcome = plan.reason
        try:
            for run, event in self._events(runs, wanted, ticket.cancelled):
                receiver.add(event, run.first)
                if receiver.is_complete:
                    break
                if time.monotonic() > deadline_s:
                    outcome = "too_slow"
                    break
        except PeerError as error:
            # What had arrived whole is still good.
            self._monitor.failed("fetch", error)
            outcome = error.reason
        ticket.pages = receiver.whole_prefix()
        for page_hash, page in reversed(list(zip(wanted, ticket.pages, strict=False))):
            self._cache.put(page_hash, page)
        for key in receiver.gone:
            self._stored.update(key.namespace_digest, [key.page_hash], [False])
        damaged += receiver.damaged
        return receiver.failure or ("cancelled" if ticket.cancelled.is_set() else outcome)

    def _events(
        self, runs: Sequence[_Run], wanted: Sequence[bytes], cancelled: threading.Event
    ) -> Iterator[tuple[_Run, FetchEvent]]:
        """Fetches the pages of one run after another."""
        for run in runs:
            of_run = wanted[run.first : run.first + run.pages]
            if of_run:
                for event in self._peer.fetch(run.namespace_digest, of_run, cancelled):
                    yield run, event

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
                lookup = self._peer.lookup(namespace_digest, rest)
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


class _Receiver:
    """Turns the events of one fetch into pages; a bad page ends the prefix there."""

    def __init__(self, keys: Sequence[PageKey], transforms: PageTransforms, max_bytes: int) -> None:
        self._keys = keys
        self._transforms = transforms
        self._assemblies: dict[int, PageAssembly] = {}
        self._pages: dict[int, PageObject] = {}
        self._usable = len(keys)
        self._free_bytes = max_bytes
        self.damaged: list[PageKey] = []
        self.gone: list[PageKey] = []
        self.failure = ""

    @property
    def is_complete(self) -> bool:
        return len(self._pages) >= self._usable

    def add(self, event: FetchEvent, first: int) -> None:
        """Takes an event of a fetch of the pages from ``first`` on."""
        index = first + event.page_index
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
