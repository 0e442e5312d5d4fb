"""Several peers as one: spread, replicated, and none of them needed."""

import dataclasses
import threading
import time

import pytest
from prometheus_client import REGISTRY

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.errors import ConfigurationError, PeerRejectedError, PeerTimeoutError, PeerUnavailableError
from sglang_kvcodec.format.exchange import (
    CalibrationEntry,
    FetchedFragment,
    FetchedHeader,
    FetchedMissing,
    LookupResult,
    PeerStat,
    PutOutcome,
    PutResult,
)
from sglang_kvcodec.format.namespace import FORMAT_VERSION
from sglang_kvcodec.rpc import merged_fetch
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.connect import connect as connect_remote
from sglang_kvcodec.rpc.several import SeveralPeers

HEADER_BYTES = 3


class FakePeer:
    """A peer that is a dict; ``before(method)`` may raise or wait."""

    def __init__(self):
        self.objects = {}
        self.calibrations = []
        self.before = lambda method: None
        self.calls = []
        self.format_version = FORMAT_VERSION
        self.cut_after = None
        """Fragments of a fetch after which the peer is gone."""

    def _called(self, method, count=0):
        self.calls.append((method, count))
        self.before(method)

    def lookup(self, namespace_digest, page_hashes):
        self._called("lookup", len(page_hashes))
        objects = [self.objects.get((namespace_digest, page_hash)) for page_hash in page_hashes]
        present = tuple(data is not None for data in objects)
        covered = (*present, False).index(False)
        return LookupResult(covered, present, sum(map(len, objects[:covered])))

    def fetch(self, namespace_digest, page_hashes, cancelled=None):
        self._called("fetch", len(page_hashes))
        stored = {}
        for index, page_hash in enumerate(page_hashes):
            data = self.objects.get((namespace_digest, page_hash))
            if data is None:
                yield FetchedMissing(index)
            else:
                stored[index] = data
                yield FetchedHeader(index, len(data), data[:HEADER_BYTES])
        fragments = 0
        most = max(map(len, stored.values()), default=0)
        for at in range(HEADER_BYTES, most, 7):
            for index, data in stored.items():
                if at < len(data):
                    if cancelled.is_set():
                        return
                    if fragments == self.cut_after:
                        raise PeerUnavailableError("cut off")
                    fragments += 1
                    yield FetchedFragment(index, at, data[at : at + 7])

    def put(self, namespace_digest, objects):
        self._called("put", len(objects))
        results = []
        for page_hash, data in objects:
            key = namespace_digest, page_hash
            results.append(PutResult(PutOutcome.ALREADY_STORED if key in self.objects else PutOutcome.STORED))
            self.objects.setdefault(key, data)
        return results

    def delete(self, namespace_digest, page_hashes):
        self._called("delete", len(page_hashes))
        return sum(self.objects.pop((namespace_digest, page_hash), None) is not None for page_hash in page_hashes)

    def stat(self):
        self._called("stat")
        stored_bytes = sum(map(len, self.objects.values()))
        return PeerStat(len(self.objects), stored_bytes, 1000, 1, "fake", self.format_version, "1")

    def put_calibration(self, model_digest, artifact, progress=None):
        self._called("put_calibration")
        digest = artifact[:1] * 32
        self.calibrations = [dataclasses.replace(entry, is_current=False) for entry in self.calibrations]
        self.calibrations.append(CalibrationEntry(model_digest, digest, len(artifact), len(self.calibrations), True))
        return digest

    def get_calibration(self, model_digest, digest=None, progress=None):
        self._called("get_calibration")
        return next(
            (entry.digest[:1] * entry.size_bytes for entry in self.calibrations if entry.digest == digest), None
        )

    def list_calibrations(self):
        self._called("list_calibrations")
        return self.calibrations

    def delete_calibration(self, model_digest, digest):
        self._called("delete_calibration")
        before = len(self.calibrations)
        self.calibrations = [entry for entry in self.calibrations if entry.digest != digest]
        return len(self.calibrations) < before

    def close(self):
        self.calls.append(("close", 0))


def gone(method):
    raise PeerUnavailableError("gone")


NAMES = ("a:1", "b:2", "c:3", "d:4")


@pytest.fixture
def fakes():
    return {name: FakePeer() for name in NAMES}


@pytest.fixture
def several(fakes):
    opened = []

    def make(replicas):
        opened.append(SeveralPeers(fakes, replicas))
        return opened[-1]

    yield make
    for peer in opened:
        peer.close()


@pytest.fixture
def objects(namespace, page):
    """41 hashes and objects, of different sizes, one no longer than its header."""
    return [(page(i, (1,) * 6)[0], bytes([i]) * (HEADER_BYTES + 5 * i)) for i in range(41)]


@pytest.fixture
def hashes(objects):
    return [page_hash for page_hash, _ in objects]


def assemble(events):
    pages = {}
    for event in events:
        if isinstance(event, FetchedHeader):
            pages[event.page_index] = bytearray(event.header) + bytearray(event.object_bytes - len(event.header))
        elif isinstance(event, FetchedMissing):
            pages[event.page_index] = None
        else:
            pages[event.page_index][event.offset : event.offset + len(event.data)] = event.data
    return pages


def asked_of(fake):
    return sum(count for method, count in fake.calls if method == "fetch")


def outcomes(results):
    return {result.outcome for result in results}


@pytest.mark.parametrize("replicas", [1, 2, 4, 9])
def test_pages_are_spread_and_come_back(several, fakes, namespace, objects, hashes, replicas):
    peer = several(replicas)
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.STORED}
    copies = [sum((namespace, page_hash) in fake.objects for fake in fakes.values()) for page_hash in hashes]
    assert set(copies) == {min(replicas, 4)}
    assert all(fake.objects for fake in fakes.values())
    lookup = peer.lookup(namespace, hashes)
    assert (lookup.covered_pages, lookup.present) == (41, (True,) * 41)
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.ALREADY_STORED}


def test_a_lookup_is_one_call_to_each_peer_at_once(several, fakes, namespace, hashes):
    together = threading.Barrier(4)
    for fake in fakes.values():
        fake.before = lambda method: together.wait(timeout=60)
    lookup = several(1).lookup(namespace, hashes)
    assert lookup == LookupResult(0, (False,) * 41, 0)
    assert sum(count for fake in fakes.values() for _, count in fake.calls) == 41
    assert all(len(fake.calls) == 1 for fake in fakes.values())


def test_the_longest_prefix_goes_over_all_peers(several, fakes, namespace, objects, hashes):
    peer = several(1)
    peer.put(namespace, objects[:17] + objects[18:])
    lookup = peer.lookup(namespace, hashes)
    assert lookup.covered_pages == 17
    assert lookup.present == tuple(index != 17 for index in range(41))
    covered_bytes = sum(len(data) for _, data in objects[:17])
    assert 0.5 * covered_bytes < lookup.covered_bytes < 3 * covered_bytes
    assert peer.lookup(namespace, []) == LookupResult(0, (), 0)


def test_a_lookup_does_not_wait_for_a_slow_replica(several, fakes, namespace, objects, hashes):
    peer = several(4)
    peer.put(namespace, objects)
    ended = threading.Event()
    fakes["b:2"].before = lambda method: ended.wait(60)
    assert peer.lookup(namespace, hashes).covered_pages == 41
    ended.set()


@pytest.mark.parametrize("error", [PeerUnavailableError("gone"), PeerTimeoutError("slow")])
def test_the_loss_of_any_peer_is_survived(several, fakes, namespace, objects, hashes, error):
    def fails(method):
        raise error

    for name in NAMES:
        peer = several(2)
        peer.put(namespace, objects)
        fakes[name].before = fails
        assert peer.lookup(namespace, hashes).covered_pages == 41
        assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
        called = len(fakes[name].calls)
        # It is left alone.
        peer.lookup(namespace, hashes)
        list(peer.fetch(namespace, hashes))
        assert len(fakes[name].calls) == called
        fakes[name].before = lambda method: None
        for fake in fakes.values():
            fake.objects.clear()


def test_a_peer_that_is_back_is_used_again(several, fakes, namespace, objects, hashes):
    peer = several(2)
    fakes["a:1"].before = gone
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.STORED}
    # Others have taken its place.
    for page_hash in hashes:
        assert sum((namespace, page_hash) in fake.objects for fake in fakes.values()) >= 1
    assert peer.stat().objects < 2 * 41
    fakes["a:1"].before = lambda method: None
    peer.lookup(namespace, hashes)
    assert ("lookup", 0) not in fakes["a:1"].calls
    peer.stat()
    assert peer.lookup(namespace, hashes).covered_pages == 41
    assert fakes["a:1"].calls[-1][0] == "lookup"
    more = [(bytes([i]) * 32, b"more") for i in range(50)]
    peer.put(namespace, more)
    assert fakes["a:1"].objects


@pytest.mark.parametrize("cut_after", [0, 1, 2, 15, 16, 17, 40])
def test_a_peer_that_is_lost_in_a_fetch(several, fakes, namespace, objects, hashes, cut_after):
    """What it had not sent whole comes from others."""
    peer = several(2)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    fakes["c:3"].cut_after = cut_after
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}


LIMIT_S = 30


def switches():
    return REGISTRY.get_sample_value("kvcodec_fetch_switches_total")


class Silent:
    """A fake peer that says so many words of each fetch and then no more until it is let go, or told to stop."""

    def __init__(self, fake, words):
        self.fake, self.words = fake, words
        self.go_on = threading.Event()
        self.was_stopped = threading.Event()
        self._fetch = fake.fetch
        fake.fetch = self

    def __call__(self, namespace_digest, page_hashes, cancelled=None):
        for number, event in enumerate(self._fetch(namespace_digest, page_hashes, cancelled)):
            if number == self.words:
                while not self.go_on.wait(0.01):
                    if cancelled.is_set():
                        self.was_stopped.set()
                        return
            yield event


class Slow:
    """A fake peer that takes its time for every fragment."""

    def __init__(self, fake, seconds=0.001):
        self.seconds = seconds
        self.was_stopped = threading.Event()
        self._fetch = fake.fetch
        fake.fetch = self

    def __call__(self, namespace_digest, page_hashes, cancelled=None):
        for event in self._fetch(namespace_digest, page_hashes, cancelled):
            if isinstance(event, FetchedFragment):
                time.sleep(self.seconds)
            if cancelled.is_set():
                self.was_stopped.set()
                return
            yield event


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(merged_fetch, "_SILENCE_S", 0.5)
    monkeypatch.setattr(merged_fetch, "_FIRST_WORD_S", 0.5)


@pytest.mark.parametrize("words", [0, 1, 12, 30])
def test_a_peer_that_falls_silent_in_a_fetch_is_left(several, fakes, namespace, objects, hashes, words, impatient):
    before = switches()
    peer = several(2)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    silent = Silent(fakes["c:3"], words)
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert silent.was_stopped.wait(LIMIT_S)
    assert before < switches() < before + len(hashes)


class Second:
    """A fake peer whose second fetch waits, or does what it is told to."""

    def __init__(self, fake, act):
        self.act = act
        self.fetches = 0
        self._fetch = fake.fetch
        fake.fetch = self

    def __call__(self, namespace_digest, page_hashes, cancelled=None):
        self.fetches += 1
        if self.fetches > 1:
            self.act(cancelled)
        yield from self._fetch(namespace_digest, page_hashes, cancelled)


def test_a_peer_that_speaks_again_before_another_one_goes_on(several, fakes, namespace, objects, hashes, impatient):
    """What it has sent of a page counts then, and the others are told to stop."""
    before = switches()
    peer = several(2)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    silent = Silent(fakes["c:3"], 12)
    has_stopped = threading.Semaphore(0)

    def wait(cancelled):
        silent.go_on.set()
        while not cancelled.wait(0.01):
            pass
        has_stopped.release()

    others = [Second(fakes[name], wait) for name in ("a:1", "b:2", "d:4")]
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert switches() > before
    assert not silent.was_stopped.is_set()
    for _ in range(sum(other.fetches - 1 for other in others)):
        assert has_stopped.acquire(timeout=LIMIT_S)


def test_others_that_fail_while_a_peer_is_silent(several, fakes, namespace, objects, hashes, impatient):
    """It still has what it was asked for, and nothing else is asked of the peers that have failed."""
    peer = several(2)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    silent = Silent(fakes["c:3"], 12)
    threading.Timer(2.0, silent.go_on.set).start()

    def fail(cancelled):
        raise PeerUnavailableError("gone")

    others = [Second(fakes[name], fail) for name in ("a:1", "b:2", "d:4")]
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert max(other.fetches for other in others) == 2
    assert not silent.was_stopped.is_set()


def test_a_silent_peer_counts_as_none_that_is_done(several, fakes, namespace, page, impatient):
    """It was fast as long as it spoke, but others that are slow are not left for it."""
    objects = [(page(i, (1,) * 6)[0], bytes([i]) * 5_000) for i in range(40)]
    hashes = [page_hash for page_hash, _ in objects]
    peer = several(4)
    peer.put(namespace, objects)
    peer.lookup(namespace, [*hashes, bytes(32)])
    silent = Silent(fakes["c:3"], 60)
    for name in ("a:1", "b:2", "d:4"):
        Slow(fakes[name], 0.002)
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert silent.was_stopped.wait(LIMIT_S)


def test_a_peer_that_is_far_behind_is_left(several, fakes, namespace, page):
    """The other one has nothing left to do, and delivers all of it anew long before."""
    objects = [(page(i, (1,) * 6)[0], bytes([i]) * 5_000) for i in range(40)]
    hashes = [page_hash for page_hash, _ in objects]
    before = switches()
    peer = several(4)
    peer.put(namespace, objects)
    slow = Slow(fakes["c:3"])
    peer.lookup(namespace, [*hashes, bytes(32)])
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert slow.was_stopped.wait(LIMIT_S)
    assert before < switches() <= before + asked_of(fakes["c:3"])


def test_a_peer_that_is_far_behind_with_the_only_copies_is_waited_for(several, fakes, namespace, page):
    objects = [(page(i, (1,) * 6)[0], bytes([i]) * 700) for i in range(40)]
    hashes = [page_hash for page_hash, _ in objects]
    before = switches()
    peer = several(1)
    peer.put(namespace, objects)
    slow = Slow(fakes["c:3"])
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert not slow.was_stopped.is_set()
    assert switches() == before


def test_a_silent_peer_with_the_only_copy_is_waited_for(several, fakes, namespace, objects, hashes, impatient):
    peer = several(1)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    silent = Silent(fakes["c:3"], 5)
    threading.Timer(1.5, silent.go_on.set).start()
    pages = assemble(peer.fetch(namespace, hashes))
    assert pages == {index: data for index, (_, data) in enumerate(objects)}
    assert not silent.was_stopped.is_set()


def test_when_all_are_silent_nobody_is_left(several, fakes, namespace, objects, hashes, impatient, monkeypatch):
    # Long enough for all to get there.
    monkeypatch.setattr(merged_fetch, "_SILENCE_S", 1.0)
    peer = several(2)
    peer.put(namespace, objects)
    peer.lookup(namespace, hashes)
    silent = [Silent(fake, 5) for fake in fakes.values()]

    def go_on():
        for each in silent:
            each.go_on.set()

    threading.Timer(2.0, go_on).start()
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert not any(each.was_stopped.is_set() for each in silent)


def test_a_page_without_another_copy_is_missing(several, fakes, namespace, objects, hashes):
    peer = several(1)
    peer.put(namespace, objects)
    lost = {index for index, page_hash in enumerate(hashes) if (namespace, page_hash) in fakes["d:4"].objects}
    fakes["d:4"].cut_after = 0
    pages = assemble(peer.fetch(namespace, hashes))
    assert {index for index, data in pages.items() if data is None} == lost - {0}
    assert all(data == objects[index][1] for index, data in pages.items() if data is not None)


def test_a_page_that_one_replica_has_lost(several, fakes, namespace, objects, hashes):
    """Evicted here, not there, after the lookup or unnoticed by one."""
    peer = several(2)
    peer.put(namespace, objects)
    expected = {index: data for index, (_, data) in enumerate(objects)}
    peer.lookup(namespace, hashes)
    fakes["a:1"].objects.clear()
    assert assemble(peer.fetch(namespace, hashes)) == expected
    assert peer.lookup(namespace, hashes).covered_pages == 41
    assert assemble(peer.fetch(namespace, hashes)) == expected


def test_a_fetch_that_is_cancelled(several, fakes, namespace, objects, hashes):
    peer = several(2)
    peer.put(namespace, objects)
    cancelled = threading.Event()
    seen = 0
    for _ in peer.fetch(namespace, hashes, cancelled):
        seen += 1
        cancelled.set()
    assert seen <= 41 * 40


def test_a_fetch_that_nobody_reads_to_its_end(several, fakes, namespace, hashes):
    """Its threads end with it."""
    fakes_objects = {(namespace, page_hash): bytes(50_000) for page_hash in hashes}
    for fake in fakes.values():
        fake.objects = dict(fakes_objects)
    peer = several(2)
    for _ in range(20):
        events = peer.fetch(namespace, hashes)
        next(events)
        events.close()
    assert assemble(peer.fetch(namespace, hashes)) == dict.fromkeys(range(41), bytes(50_000))


def test_when_no_peer_answers(several, fakes, namespace, objects, hashes):
    peer = several(2)
    for fake in fakes.values():
        fake.before = gone
    for _ in range(2):
        for call in (
            lambda: peer.lookup(namespace, hashes),
            lambda: peer.put(namespace, objects),
            lambda: list(peer.fetch(namespace, hashes)),
            lambda: peer.delete(namespace, hashes),
            peer.stat,
            peer.list_calibrations,
        ):
            with pytest.raises(PeerUnavailableError):
                call()
    for fake in fakes.values():
        fake.before = lambda method: None
    peer.stat()
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.STORED}


def test_a_put_that_loses_its_only_peer_goes_to_the_next(several, fakes, namespace, objects):
    fakes["b:2"].before = gone
    assert outcomes(several(1).put(namespace, objects)) == {PutOutcome.STORED}
    assert sum(len(fake.objects) for fake in fakes.values()) == 41


def test_a_refusal_says_nothing_against_a_peer(several, fakes, namespace, objects, hashes):
    def refuse(method):
        raise PeerRejectedError("too many streams")

    peer = several(2)
    peer.put(namespace, objects)
    fakes["a:1"].before = refuse
    assert peer.lookup(namespace, hashes).covered_pages == 41
    fakes["a:1"].before = lambda method: None
    called = len(fakes["a:1"].calls)
    peer.lookup(namespace, hashes)
    assert len(fakes["a:1"].calls) > called


def test_the_best_outcome_counts(several, fakes, namespace, objects):
    peer = several(2)
    full = fakes["a:1"]
    full.put = lambda namespace_digest, pages: [PutResult(PutOutcome.NO_CAPACITY, "full")] * len(pages)
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.STORED}
    for fake in fakes.values():
        fake.put = full.put
    assert outcomes(peer.put(namespace, objects)) == {PutOutcome.NO_CAPACITY}


def test_a_far_replica_is_not_fetched_from(several, fakes, namespace, objects, hashes):
    peer = several(2)
    peer.put(namespace, objects)
    fakes["b:2"].before = lambda method: time.sleep(0.2) if method == "lookup" else None
    # One page is nowhere, so that all answers are waited for.
    for _ in range(3):
        peer.lookup(namespace, [*hashes, bytes(32)])
    assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    assert asked_of(fakes["b:2"]) == 0


def test_a_replica_on_a_slow_link_is_asked_for_less(several, fakes, namespace, page):
    objects = [(page(i, (1,) * 6)[0], bytes([i]) * 20_000) for i in range(60)]
    hashes = [page_hash for page_hash, _ in objects]
    peer = several(4)
    peer.put(namespace, objects)
    Slow(fakes["b:2"], 1e-4)
    peer.lookup(namespace, [*hashes, bytes(32)])
    for _ in range(2):
        for fake in fakes.values():
            fake.calls.clear()
        assert assemble(peer.fetch(namespace, hashes)) == {index: data for index, (_, data) in enumerate(objects)}
    others = [asked_of(fake) for name, fake in fakes.items() if name != "b:2"]
    assert asked_of(fakes["b:2"]) < min(others)


def test_a_replica_that_answers_a_lookup_late_is_fetched_from(several, fakes, namespace, page):
    objects = [(page(i, (1,) * 6)[0], bytes(50)) for i in range(8)]
    hashes = [page_hash for page_hash, _ in objects]
    peer = several(4)
    peer.put(namespace, objects)
    go_on, waiting = threading.Event(), set(fakes) - {"a:1"}
    for name in waiting:
        fakes[name].before = lambda method: go_on.wait(60)
    assert peer.lookup(namespace, hashes).covered_pages == 8
    go_on.set()
    deadline = time.monotonic() + LIMIT_S
    while any(member.speed.latency_s == 0 for member in peer._members):
        assert time.monotonic() < deadline, "they have not answered"
        time.sleep(0.01)
    for page_hash in hashes:
        routes = peer._routes(namespace, [page_hash])
        assert sorted(routes[0]) == [0, 1, 2, 3]


def test_a_peer_of_another_format_is_not_used(several, fakes, namespace, objects, hashes):
    peer = several(1)
    fakes["c:3"].format_version = FORMAT_VERSION + 1
    stat = peer.stat()
    assert (stat.capacity_bytes, stat.evicted_objects, stat.engine) == (3000, 3, "fake")
    peer.put(namespace, objects)
    assert fakes["c:3"].objects == {}
    for fake in fakes.values():
        fake.format_version = FORMAT_VERSION + 1
    assert peer.stat().format_version == FORMAT_VERSION + 1
    fakes["c:3"].format_version = FORMAT_VERSION
    assert peer.stat().format_version == FORMAT_VERSION


def test_a_delete_is_one_of_all_copies(several, fakes, namespace, objects, hashes):
    peer = several(2)
    peer.put(namespace, objects)
    assert peer.delete(namespace, hashes) >= 41 // 2
    assert all(fake.objects == {} for fake in fakes.values())
    assert peer.lookup(namespace, hashes).covered_pages == 0


def test_calibrations_are_on_all_peers(several, fakes):
    peer, model = several(2), bytes(32)
    fakes["a:1"].before = gone
    first = peer.put_calibration(model, b"1first")
    fakes["a:1"].before = lambda method: None
    assert peer.get_calibration(model) == b"1" * 6
    peer.stat()
    second = peer.put_calibration(model, b"2second")
    assert peer.get_calibration(model) == b"2" * 7
    assert peer.get_calibration(model, first) == b"1" * 6
    assert peer.get_calibration(b"x" * 32) is None
    assert peer.get_calibration(model, b"?" * 32) is None
    entries = peer.list_calibrations()
    assert {entry.digest: entry.is_current for entry in entries} == {first: False, second: True}
    assert peer.delete_calibration(model, first) is True
    assert peer.delete_calibration(model, first) is False
    fakes["a:1"].before = fakes["b:2"].before = gone
    assert peer.get_calibration(model) == b"2" * 7


def test_closed(several, fakes, namespace, objects, hashes):
    peer = several(2)
    peer.close()
    assert all(("close", 0) in fake.calls for fake in fakes.values())
    for call in (
        lambda: peer.lookup(namespace, hashes),
        lambda: peer.put(namespace, objects),
        lambda: list(peer.fetch(namespace, hashes)),
        lambda: peer.get_calibration(bytes(32)),
        peer.stat,
    ):
        with pytest.raises(PeerUnavailableError, match="closed"):
            call()


@pytest.mark.parametrize(("names", "replicas"), [((), 1), (NAMES, 0)])
def test_nowhere_to_keep_pages(names, replicas):
    with pytest.raises(ConfigurationError):
        SeveralPeers({name: FakePeer() for name in names}, replicas)


def test_what_a_remote_stands_for():
    one, three = connect_remote("grpc://a:1"), connect_remote("grpc://a:1,b:1,c:1", Timeouts(), 2)
    assert isinstance(one, GrpcPeer)
    assert isinstance(three, SeveralPeers)
    one.close()
    three.close()
