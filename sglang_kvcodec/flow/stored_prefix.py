"""Which pages of a prompt's prefix the peer has, and in which tiers: several may be stored side by side."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

from sglang_kvcodec.cpus import take_place
from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import LookupResult, PeerTransport

MAX_RUNS = 4
"""Changes of namespace within one prefix: each costs a Lookup and a Fetch."""
TIER_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Tier:
    """A quality in which pages are stored.

    Attributes:
        profile_name: of its pages.
        namespace_digests: where they may be, the best first: pages of the others are taken where it has none.
    """

    profile_name: str
    namespace_digests: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class Run:
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


@dataclasses.dataclass(frozen=True)
class StoredPrefix:
    """The longest stored prefix, in one tier as far as that goes, in others where it has no more of it.

    Attributes:
        profile_name: of most of its pages; of the best tier where nothing is stored.
        runs: that make it up, in order; none where nothing is stored.
    """

    profile_name: str
    runs: tuple[Run, ...]

    @property
    def pages(self) -> int:
        """Its length."""
        return sum(run.pages for run in self.runs)

    @property
    def page_bytes(self) -> list[int]:
        """The size of each page."""
        return [size for run in self.runs for size in run.page_bytes]

    @property
    def namespaces(self) -> list[bytes]:
        """The namespace of each page."""
        return [run.namespace_digest for run in self.runs for _ in range(run.pages)]


class PrefixLookup:
    """Asks the peer. The first questions about several tiers go out together: a round trip is paid once."""

    def __init__(self, peer: PeerTransport, stored: StoredPages, link: LinkMeter) -> None:
        """Starts no thread before there is more than one tier.

        Args:
            peer: whom to ask.
            stored: told what the peer has and has not.
            link: told what the answers took.
        """
        self._peer, self._stored, self._link = peer, stored, link
        self._threads = concurrent.futures.ThreadPoolExecutor(TIER_THREADS, "kvcodec-tiers", take_place)

    def find(self, tiers: Sequence[Tier], page_hashes: Sequence[bytes]) -> list[StoredPrefix]:
        """What could be fetched: for each tier, the best first, the prefix with as much of it as there is.

        Returns:
            At least one. A tier that changes nothing against a better one is left out.

        Raises:
            PeerError: the peer did not answer.
        """
        answers: dict[tuple[bytes, int], LookupResult] = {}

        def ask(namespace_digest: bytes, first: int) -> LookupResult:
            key = namespace_digest, first
            if key not in answers:
                answers[key] = self._ask(namespace_digest, page_hashes[first:])
            return answers[key]

        first_asked = [tier.namespace_digests[0] for tier in tiers]
        if len(first_asked) > 1:
            found = self._threads.map(lambda digest: self._ask(digest, page_hashes), first_asked)
            answers.update(((digest, 0), answer) for digest, answer in zip(first_asked, found, strict=True))
        profile_of = {digest: tier.profile_name for tier in tiers for digest in tier.namespace_digests}
        prefixes: dict[tuple[Run, ...], StoredPrefix] = {}
        for tier in tiers:
            others = (digest for other in tiers for digest in other.namespace_digests)
            digests = list(dict.fromkeys(itertools.chain(tier.namespace_digests, others)))
            runs = _runs(digests, len(page_hashes), ask)
            longest = max(runs, key=lambda run: run.pages, default=None)
            profile_name = tier.profile_name if longest is None else profile_of[longest.namespace_digest]
            prefixes.setdefault(runs, StoredPrefix(profile_name, runs))
        return list(prefixes.values())

    def close(self) -> None:
        """Ends; the peer is to be closed first, which ends calls under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _ask(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> LookupResult:
        start_s = time.monotonic()
        lookup = self._peer.lookup(namespace_digest, page_hashes)
        self._link.round_trip(time.monotonic() - start_s)
        self._stored.update(namespace_digest, page_hashes, lookup.present)
        return lookup


def _runs(namespace_digests: Sequence[bytes], pages: int, ask: Callable[[bytes, int], LookupResult]) -> tuple[Run, ...]:
    """The longest prefix. Where a namespace has no more of it, the others are asked for what follows."""
    runs: list[Run] = []
    found = True
    while found and len(runs) < MAX_RUNS:
        first = runs[-1].first + runs[-1].pages if runs else 0
        exhausted = runs[-1].namespace_digest if runs else b""
        found = False
        for namespace_digest in namespace_digests:
            if first >= pages or namespace_digest == exhausted:
                continue
            lookup = ask(namespace_digest, first)
            if lookup.covered_pages:
                runs.append(Run(namespace_digest, first, lookup.covered_pages, lookup.covered_bytes))
                found = True
                break
    return tuple(runs)
