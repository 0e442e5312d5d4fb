"""Several storage peers as one: pages are spread over them, each on as many as there are replicas."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sglang_kvcodec import metrics
from sglang_kvcodec.cpus import take_place
from sglang_kvcodec.errors import ConfigurationError, PeerError, PeerRejectedError, PeerUnavailableError
from sglang_kvcodec.format.exchange import (
    CalibrationEntry,
    FetchEvent,
    LookupResult,
    PeerStat,
    PeerTransport,
    Progress,
    PutOutcome,
    PutResult,
)
from sglang_kvcodec.format.namespace import FORMAT_VERSION
from sglang_kvcodec.rpc.merged_fetch import MergedFetch
from sglang_kvcodec.rpc.peer_speed import PeerSpeed, share_out
from sglang_kvcodec.rpc.placement import Placement

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CALLS_AT_ONCE = 8
"""Calls of this client that ask all peers: as many as a server has threads that fetch."""
_HOLDERS_REMEMBERED = 1 << 16
_GRACE, _LEAST_GRACE_S = 0.5, 0.001
"""Once all pages of a Lookup have been found, the other peers get so much more time: those that are about as near could
deliver some of them."""
_PAGE_BYTES = 1 << 18
"""Of a page, before any was fetched."""
_PAGE_BYTES_WEIGHT = 0.3
_BEST_OUTCOME = (PutOutcome.STORED, PutOutcome.ALREADY_STORED, PutOutcome.NO_CAPACITY, PutOutcome.REJECTED)


class _Member:
    """One of the peers, and what is known of it."""

    def __init__(self, name: str, transport: PeerTransport) -> None:
        self.name = name
        self.transport = transport
        self.is_up = True
        self.speed = PeerSpeed()


class SeveralPeers:
    """Implements ``format.exchange.PeerTransport``; see there, and :mod:`placement` for where pages go.

    A peer that does not answer is left alone, and its pages go to the next ones in their order, until :meth:`stat`
    hears of it again: a server asks for that every two seconds. A call fails only if no peer answers.
    """

    def __init__(self, members: Mapping[str, PeerTransport], replicas: int) -> None:
        """Takes over the transports.

        Args:
            members: name -> peer. All clients have to call the peers by the same names.
            replicas: on how many peers each page is kept; on all of them if there are fewer.

        Raises:
            ConfigurationError: fewer than one peer or replica.
        """
        if not members or replicas < 1:
            raise ConfigurationError("pages are kept on at least one peer")
        self._members = [_Member(name, transport) for name, transport in members.items()]
        self._placement = Placement(list(members))
        self._replicas = min(replicas, len(members))
        self._closed = False
        self._lock = threading.Lock()
        self._holders: OrderedDict[bytes, list[int]] = OrderedDict()
        self._page_bytes = float(_PAGE_BYTES)
        # Apart, so that no Lookup waits behind long fetches.
        threads = _CALLS_AT_ONCE * len(members)
        self._calls = ThreadPoolExecutor(threads, "kvcodec-peers", take_place)
        self._streams = ThreadPoolExecutor(threads, "kvcodec-streams", take_place)
        self._export()

    def lookup(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> LookupResult:
        """Which of the pages are stored on any peer, asked all at once. ``covered_bytes`` is estimated.

        Does not wait for far peers once every page has been found; what they say later counts in a fetch.
        """
        shares = self._shares(namespace_digest, page_hashes)
        if not shares:
            return LookupResult(0, (), 0)
        present = [False] * len(page_hashes)
        covered_pages = covered_bytes = 0

        def ask(member: _Member, indices: Sequence[int]) -> LookupResult:
            started_s = time.monotonic()
            asked = [page_hashes[index] for index in indices]
            found = member.transport.lookup(namespace_digest, asked)
            member.speed.answered_in(time.monotonic() - started_s)
            self._remember(member, namespace_digest, asked, found.present)
            return found

        for _, indices, found in self._ask(shares, ask, lambda: all(present)):
            covered_pages += found.covered_pages
            covered_bytes += found.covered_bytes
            for index, is_there in zip(indices, found.present, strict=True):
                present[index] |= is_there
        covered = present.index(False) if False in present else len(present)
        # Peers say how large their own pages are together.
        estimate = -(-covered_bytes * covered // covered_pages) if covered_pages else 0
        return LookupResult(covered, tuple(present), estimate)

    def fetch(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], cancelled: threading.Event | None = None
    ) -> Generator[FetchEvent, None, None]:
        """The pages, from all peers at once, each in its order. A page that is cut off comes anew from another peer."""
        self._require_up()

        def fetch_from(number: int, indices: Sequence[int], stop: threading.Event) -> Iterator[FetchEvent]:
            member = self._members[number]
            try:
                yield from member.transport.fetch(namespace_digest, [page_hashes[index] for index in indices], stop)
            except PeerError as error:
                self._failed(member, error)
                raise

        routes = self._routes(namespace_digest, page_hashes)
        yield from MergedFetch(fetch_from, routes, self._streams, self._delivered, cancelled).events()

    def put(self, namespace_digest: bytes, objects: Sequence[tuple[bytes, bytes]]) -> list[PutResult]:
        """Stores each object on its peers; the best that became of it. One that fails leaves it to the next."""
        results: list[PutResult | None] = [None] * len(objects)

        def send(member: _Member, indices: Sequence[int]) -> list[PutResult]:
            return member.transport.put(namespace_digest, [objects[index] for index in indices])

        # A peer that turns out to be gone changes where pages go: once more for those that have found none.
        for _ in self._members:
            left = [index for index, result in enumerate(results) if result is None]
            if not left:
                break
            try:
                shares = self._shares(namespace_digest, [objects[index][0] for index in left])
                shares = {number: [left[index] for index in indices] for number, indices in shares.items()}
                for _, indices, sent in self._ask(shares, send):
                    for index, result in zip(indices, sent, strict=True):
                        results[index] = _better(results[index], result)
            except PeerError:
                if len(left) == len(objects):
                    raise
                break
        return [result or PutResult(PutOutcome.NO_CAPACITY, "no peer took it") for result in results]

    def delete(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> int:
        """Deletes pages from all peers that answer; the most that one of them had."""
        with self._lock:
            for page_hash in page_hashes:
                self._holders.pop(namespace_digest + page_hash, None)
        shares = {number: range(len(page_hashes)) for number in self._up()}
        return max(
            deleted
            for _, _, deleted in self._ask(
                shares, lambda member, _: member.transport.delete(namespace_digest, page_hashes)
            )
        )

    def stat(self) -> PeerStat:
        """The sum of all peers that answer; asks all, also those that have not answered before."""
        stats = []
        for number, _, stat in self._ask(
            {number: () for number in range(len(self._members))}, lambda member, _: member.transport.stat()
        ):
            stats.append(stat)
            self._speaks(self._members[number], stat)
        fitting = [stat for stat in stats if stat.format_version == FORMAT_VERSION]
        if not fitting:
            return stats[0]
        return PeerStat(
            objects=sum(stat.objects for stat in fitting),
            stored_bytes=sum(stat.stored_bytes for stat in fitting),
            capacity_bytes=sum(stat.capacity_bytes for stat in fitting),
            evicted_objects=sum(stat.evicted_objects for stat in fitting),
            engine=_joined(stat.engine for stat in fitting),
            format_version=FORMAT_VERSION,
            software_version=_joined(stat.software_version for stat in fitting),
        )

    def put_calibration(self, model_digest: bytes, artifact: bytes, progress: Progress | None = None) -> bytes:
        """Stores a calibration artifact on all peers that answer: each page of it is of no use without.

        ``progress`` is told of the first of them.
        """
        shares = {number: () for number in self._up()}
        digests = [
            digest
            for _, _, digest in self._ask(
                shares,
                lambda member, _: member.transport.put_calibration(
                    model_digest, artifact, progress if member is self._members[min(shares)] else None
                ),
            )
        ]
        return digests[0]

    def get_calibration(
        self, model_digest: bytes, digest: bytes | None = None, progress: Progress | None = None
    ) -> bytes | None:
        """The artifact that was put last on any peer, or the one that ``digest`` names, from whichever has it."""
        if digest is None:
            entries = [entry for entry in self.list_calibrations() if entry.model_digest == model_digest]
            digest = next((entry.digest for entry in entries if entry.is_current), None)
            if digest is None:
                return None
        last_error: PeerError | None = None
        for number in self._up():
            member = self._members[number]
            try:
                artifact = member.transport.get_calibration(model_digest, digest, progress)
            except PeerError as error:
                self._failed(member, error)
                last_error = error
                continue
            if artifact is not None:
                return artifact
        if last_error is not None:
            raise last_error
        return None

    def list_calibrations(self) -> list[CalibrationEntry]:
        """All calibration artifacts of all peers; of each model the one that is current on a peer and was put last."""
        newest: dict[tuple[bytes, bytes], CalibrationEntry] = {}
        current: dict[bytes, CalibrationEntry] = {}
        shares = {number: () for number in self._up()}
        for _, _, entries in self._ask(shares, lambda member, _: member.transport.list_calibrations()):
            for entry in entries:
                key = entry.model_digest, entry.digest
                newest[key] = max(newest.get(key, entry), entry, key=_stored_at_ms)
                if entry.is_current:
                    other = current.get(entry.model_digest, entry)
                    current[entry.model_digest] = max(other, entry, key=_stored_at_ms)
        return [
            dataclasses.replace(entry, is_current=current[entry.model_digest].digest == entry.digest)
            for entry in newest.values()
        ]

    def delete_calibration(self, model_digest: bytes, digest: bytes) -> bool:
        """Deletes a calibration artifact from all peers that answer; whether any had it."""
        shares = {number: () for number in self._up()}
        return any(
            [
                deleted
                for _, _, deleted in self._ask(
                    shares, lambda member, _: member.transport.delete_calibration(model_digest, digest)
                )
            ]
        )

    def close(self) -> None:
        """Ends every call under way with ``PeerUnavailableError``."""
        self._closed = True
        for member in self._members:
            member.transport.close()
        self._calls.shutdown(wait=True, cancel_futures=True)
        self._streams.shutdown(wait=True, cancel_futures=True)

    def _up(self) -> list[int]:
        return [number for number, member in enumerate(self._members) if member.is_up]

    def _require_up(self) -> None:
        if self._closed:
            raise PeerUnavailableError("the client of several peers is closed")
        if not self._up():
            raise PeerUnavailableError(f"none of {len(self._members)} peers answers")

    def _shares(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> dict[int, list[int]]:
        """Peer -> indices of the pages that belong to it, of the peers that answer."""
        self._require_up()
        up = set(self._up())
        shares: dict[int, list[int]] = {}
        for index, order in enumerate(self._placement.order(namespace_digest, page_hashes).tolist()):
            for number in [number for number in order if number in up][: self._replicas]:
                shares.setdefault(number, []).append(index)
        return shares

    def _routes(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> list[list[int]]:
        """For each page the peers to ask for it, in their order: those that are known to have it, then its own."""
        up = set(self._up())
        with self._lock:
            known = [tuple(self._holders.get(namespace_digest + page_hash, ())) for page_hash in page_hashes]
        holders, others = [], []
        for order, found_at in zip(self._placement.order(namespace_digest, page_hashes).tolist(), known, strict=True):
            answering = [number for number in order if number in up]
            holders.append([number for number in answering if number in found_at])
            # A Lookup does not wait for all, so others may have it as well.
            others.append([number for number in answering[: self._replicas] if number not in found_at])
        # Where nobody is known to have it, those that should are as good.
        first = [found or should for found, should in zip(holders, others, strict=True)]
        routes = share_out(first, [member.speed for member in self._members], self._page_bytes)
        return [
            route + should if found else route for route, found, should in zip(routes, holders, others, strict=True)
        ]

    def _delivered(self, number: int, size_bytes: int, seconds: float, page_bytes: float) -> None:
        """One peer's part of a fetch is over."""
        self._members[number].speed.delivered(size_bytes, seconds)
        if page_bytes:
            self._page_bytes += _PAGE_BYTES_WEIGHT * (page_bytes - self._page_bytes)

    def _remember(
        self, member: _Member, namespace_digest: bytes, page_hashes: Sequence[bytes], present: Sequence[bool]
    ) -> None:
        """What a peer has just said of pages."""
        number = self._members.index(member)
        with self._lock:
            for page_hash, is_there in zip(page_hashes, present, strict=True):
                key = namespace_digest + page_hash
                found_at = self._holders.setdefault(key, [])
                if is_there != (number in found_at):
                    (found_at.append if is_there else found_at.remove)(number)
                if found_at:
                    self._holders.move_to_end(key)
                else:
                    del self._holders[key]
            while len(self._holders) > _HOLDERS_REMEMBERED:
                self._holders.popitem(last=False)

    def _ask(
        self,
        shares: Mapping[int, Sequence[int]],
        call: Callable[[_Member, Sequence[int]], T],
        is_enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Sequence[int], T]]:
        """Calls peers at once; what they answer, as it comes.

        Once that ``is_enough``, others are waited for while they are only somewhat farther.

        Raises:
            PeerError: none has answered.
        """
        if self._closed:
            raise PeerUnavailableError("the client of several peers is closed")
        last_error: PeerError | None = None
        has_answer = False
        try:
            futures = {
                self._calls.submit(self._call, self._members[number], call, indices): (number, indices)
                for number, indices in shares.items()
            }
        except RuntimeError as error:
            raise PeerUnavailableError("the client of several peers is closed") from error
        started_s, until_s, waiting = time.monotonic(), math.inf, set(futures)
        while waiting:
            left_s = None if until_s == math.inf else max(0.0, until_s - time.monotonic())
            answered, waiting = concurrent.futures.wait(waiting, left_s, concurrent.futures.FIRST_COMPLETED)
            if not answered:
                break
            for future in answered:
                try:
                    answer = _result(future)
                except PeerError as error:
                    last_error = error
                    continue
                has_answer = True
                yield *futures[future], answer
            if until_s == math.inf and is_enough():
                now_s = time.monotonic()
                until_s = now_s + max(_LEAST_GRACE_S, _GRACE * (now_s - started_s))
        if not has_answer:
            raise last_error or PeerUnavailableError(f"none of {len(self._members)} peers answers")

    def _call(self, member: _Member, call: Callable[[_Member, Sequence[int]], T], indices: Sequence[int]) -> T:
        try:
            return call(member, indices)
        except PeerError as error:
            self._failed(member, error)
            raise

    def _failed(self, member: _Member, error: PeerError) -> None:
        """Leaves a peer alone that does not answer. A refused request says nothing against it."""
        if isinstance(error, PeerRejectedError) or self._closed:
            return
        if member.is_up:
            logger.warning("kvcodec: the peer %s is gone, the others take its place: %s", member.name, error)
        member.is_up = False
        self._export()

    def _speaks(self, member: _Member, stat: PeerStat) -> None:
        is_fitting = stat.format_version == FORMAT_VERSION
        if is_fitting != member.is_up:
            if is_fitting:
                logger.info("kvcodec: the peer %s is back", member.name)
            else:
                logger.warning(
                    "kvcodec: the peer %s keeps format version %d, not %d, and is not used",
                    *(member.name, stat.format_version, FORMAT_VERSION),
                )
        member.is_up = is_fitting
        self._export()

    def _export(self) -> None:
        metrics.PEERS_UP.set(len(self._up()))


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise PeerUnavailableError("the client of several peers was closed") from None


def _better(one: PutResult | None, other: PutResult) -> PutResult:
    return other if one is None else min(one, other, key=lambda result: _BEST_OUTCOME.index(result.outcome))


def _stored_at_ms(entry: CalibrationEntry) -> int:
    return entry.stored_at_ms


def _joined(words: Iterable[str]) -> str:
    return ",".join(sorted(set(words)))
