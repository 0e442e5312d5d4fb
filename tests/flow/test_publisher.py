import dataclasses
import os
import signal
import threading

import pytest
from flow_kit import GROUPED, LIMIT_S, NAMESPACE, SMALL, TIMEOUTS, counted, wait_until

from sglang_kvcodec.errors import CodecError, PeerRejectedError, PeerUnavailableError
from sglang_kvcodec.flow.offload import Target
from sglang_kvcodec.flow.page_codec import PageEncoder
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.exchange import PutOutcome, PutResult
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.pages import Pages, hash_of, new_encoder
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video.encoder_processes import EncoderProcesses

PATIENT = dataclasses.replace(TIMEOUTS, retry_s=LIMIT_S / 2)
"""Of the publisher alone: time to restart a peer before pages are dropped."""
OTHER_NAMESPACE = bytes(range(32, 64))


class Setup:
    """A publisher of a pool of four pages, which are called 0 to 3."""

    def __init__(self, connection, config, spec, before_encode=lambda page_hash: None, on_page=lambda *args: None):
        self.coded = {}
        self.peer, self.monitor = connection.peer, connection.monitor
        self.profile = config.profile
        self.pool = KnownPool(spec, 4)
        self.values = [self.pool.fill(page, seed=10 * page) for page in range(4)]
        self.stored = StoredPages()
        self.encoded = []
        self.positions = {}
        self._before_encode = before_encode
        self.publisher = Publisher(
            self.peer,
            self.monitor,
            self.stored,
            self.pool.wrapped,
            self._new_encoder,
            self._tier_of,
            config,
            on_page,
            on_coded=self.coded.__setitem__,
            recall=lambda namespace, page_hash: self.coded.get(page_hash),
        )

    def _new_encoder(self, namespace_digest):
        inner = new_encoder(namespace_digest, self.pool.spec, self.profile)
        setup = self

        class Encoder:
            def encode(self, page_hash, values, first_position):
                setup._before_encode(page_hash)
                setup.encoded.append(page_hash)
                setup.positions[page_hash] = first_position
                return inner.encode(page_hash, values)

        return Encoder()

    def _tier_of(self, namespace_digest):
        return "other" if namespace_digest == OTHER_NAMESPACE else self.profile

    def offload(self, pages=range(4), namespace=NAMESPACE, first_position=0):
        pages = list(pages)
        hashes = [hash_of(page) for page in pages]
        return self.publisher.offload(
            [Target(namespace, range(len(pages)))], hashes, self.pool.slots(pages), (), first_position
        )

    def offload_to(self, targets, pages=range(4)):
        pages = list(pages)
        hashes = [hash_of(page) for page in pages]
        return self.publisher.offload(targets, hashes, self.pool.slots(pages), ())

    def publish(self, pages=range(4), namespace=NAMESPACE):
        offload = self.offload(pages, namespace)
        assert offload.wait(LIMIT_S)
        assert self.publisher.wait_until_empty(LIMIT_S)
        return offload

    def assert_stored(self, engine, pages=range(4), namespace=NAMESPACE):
        reader = Pages(self.pool.spec, self.profile, namespace)
        for page in pages:
            data = engine.get(reader.key(page))
            assert data is not None
            assert same_bits(reader.decode(PageObject(data)), self.values[page])


@pytest.fixture
def set_up(connect, config, closing):
    def make(
        peer,
        spec=SMALL,
        expect_up=True,
        before_encode=lambda page_hash: None,
        on_page=lambda *args: None,
        **changes,
    ):
        connection = connect(peer.remote, expect_up)
        setup = Setup(connection, dataclasses.replace(config, **changes), spec, before_encode, on_page)
        closing.callback(setup.publisher.close)
        return setup

    return make


def assert_empty():
    assert counted("kvcodec_publish_queue_bytes") == 0


@pytest.mark.parametrize(("profile", "encode_threads"), [("raw", 1), ("exact", 2)])
def test_pages_land_at_the_peer_bit_for_bit(engine, local_peer, set_up, delta, profile, encode_threads):
    setup = set_up(local_peer, GROUPED, profile=profile, encode_threads=encode_threads)
    assert setup.publish([2, 0, 3]).succeeded is True
    setup.assert_stored(engine, [2, 0, 3])
    assert engine.stat().objects == 3
    assert delta("kvcodec_published_pages_total", outcome="stored", tier=profile) == 3
    assert delta("kvcodec_published_kv_bytes_total", tier=profile) == 3 * GROUPED.page_bytes
    assert delta("kvcodec_published_bytes_total", tier=profile) == engine.stat().stored_bytes
    assert_empty()


def test_page_objects_are_shown_as_they_are_sent(engine, local_peer, set_up):
    setup = set_up(local_peer)
    setup.publish()
    assert setup.coded == {hash_of(page): engine.get(NAMESPACE + hash_of(page)) for page in range(4)}


def test_what_is_published_is_what_the_slots_held_when_it_was_settled(engine, local_peer, set_up, gate):
    setup = set_up(local_peer, before_encode=lambda page_hash: gate.wait(LIMIT_S))
    offload = setup.offload()
    assert offload.wait(LIMIT_S)
    for page in range(4):
        setup.pool.fill(page, seed=999)
    gate.set()
    assert setup.publisher.wait_until_empty(LIMIT_S)
    setup.assert_stored(engine)


def test_pages_that_are_known_to_be_stored_settle_at_once_and_are_not_sent(engine, local_peer, set_up, delta):
    setup = set_up(local_peer)
    setup.publish()
    setup.peer.calls.clear()
    again = setup.offload()
    assert again.succeeded is True
    assert setup.peer.calls == []
    assert len(setup.encoded) == 4
    assert delta("kvcodec_published_pages_total", outcome="stored", tier="raw") == 4
    assert_empty()


def test_the_same_pages_of_another_namespace_are_other_pages(engine, local_peer, set_up):
    setup = set_up(local_peer)
    setup.publish()
    setup.publish(namespace=OTHER_NAMESPACE)
    setup.assert_stored(engine, namespace=OTHER_NAMESPACE)
    assert engine.stat().objects == 8


def test_a_killed_encoder_process_costs_the_page_it_was_coding(engine, local_peer, set_up, delta, closing, monkeypatch):
    processes = EncoderProcesses(1)
    closing.callback(processes.close)

    def in_process(namespace_digest, spec, profile):
        return PageEncoder(namespace_digest, PageTransforms(spec, profile), processes.encoder())

    def kill_amid_page_1(page_hash):
        if page_hash == hash_of(1):
            (pid,) = processes.process_ids
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()

    monkeypatch.setattr("test_publisher.new_encoder", in_process)
    setup = set_up(local_peer, profile="exact", before_encode=kill_amid_page_1)
    assert setup.publish().succeeded is True
    setup.assert_stored(engine, [0, 2, 3])
    assert engine.stat().objects == 3
    assert delta("kvcodec_publish_drops_total", reason="encoder_died") == 1
    assert delta("kvcodec_encoder_processes_lost_total") == 1
    assert_empty()


def test_only_what_the_peer_has_not_is_coded_and_sent(engine, local_peer, set_up, delta):
    setup = set_up(local_peer)
    others = Pages(SMALL, "raw", NAMESPACE)
    for page in (1, 3):
        engine.put(others.key(page), others.coded(page))
    assert setup.publish().succeeded is True
    assert setup.encoded == [hash_of(0), hash_of(2)]
    setup.assert_stored(engine, [0, 2])
    assert delta("kvcodec_published_pages_total", outcome="already_stored", tier="raw") == 2
    assert delta("kvcodec_published_pages_total", outcome="stored", tier="raw") == 2
    assert setup.offload().succeeded is True
    assert_empty()


def test_pages_keep_their_positions_whichever_are_left_out(engine, local_peer, set_up):
    setup = set_up(local_peer)
    others = Pages(SMALL, "raw", NAMESPACE)
    setup.publish([0])
    engine.put(others.key(2), others.coded(2))
    setup.offload([0, 1, 2, 3], first_position=5 * SMALL.page_tokens)
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert setup.positions == {
        hash_of(0): 0,
        hash_of(1): 6 * SMALL.page_tokens,
        hash_of(3): 8 * SMALL.page_tokens,
    }


def test_pages_that_will_be_published_are_shown_with_their_positions(engine, local_peer, set_up):
    shown = []
    setup = set_up(local_peer, on_page=lambda values, position: shown.append((position, values)))
    others = Pages(SMALL, "raw", NAMESPACE)
    engine.put(others.key(2), others.coded(2))
    setup.offload([1, 2, 3], first_position=SMALL.page_tokens)
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert [position for position, _ in shown] == [SMALL.page_tokens, 3 * SMALL.page_tokens]
    assert all(same_bits(values, setup.values[page]) for page, (_, values) in zip([1, 3], shown, strict=True))


def test_a_page_that_another_server_stores_meanwhile_is_kept_as_it_is(engine, local_peer, set_up, delta):
    others = Pages(SMALL, "raw", NAMESPACE)
    theirs = others.coded(0)
    setup = set_up(local_peer, before_encode=lambda page_hash: engine.put(others.key(0), theirs))
    setup.publish([0])
    assert engine.get(others.key(0)) == theirs
    assert delta("kvcodec_published_pages_total", outcome="already_stored", tier="raw") == 1
    assert delta("kvcodec_publish_drops_total", reason="already_stored") == 0
    assert_empty()


def holding(set_up, local_peer, gate, pages, **changes):
    """A publisher with room for so many pages; the first page is being encoded, the others wait."""
    begun = threading.Event()

    def hold(page_hash):
        begun.set()
        gate.wait(LIMIT_S)

    setup = set_up(
        local_peer,
        before_encode=hold,
        publish_queue_bytes=pages * SMALL.page_bytes,
        encode_threads=1,
        encoder_processes=0,
        **changes,
    )
    assert setup.offload(range(pages)).wait(LIMIT_S)
    assert begun.wait(LIMIT_S)
    wait_until(lambda: len(setup.publisher._pages.waiting()) == pages - 1)
    return setup


def test_where_there_is_no_room_what_has_waited_longest_is_dropped_and_counted(engine, local_peer, set_up, delta, gate):
    setup = holding(set_up, local_peer, gate, 3)
    assert setup.offload([3]).wait(LIMIT_S)
    wait_until(lambda: len(setup.publisher._pages.waiting()) == 2)
    assert delta("kvcodec_publish_drops_total", reason="queue_full") == 1
    assert counted("kvcodec_publish_queue_bytes") == 3 * SMALL.page_bytes
    gate.set()
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert sorted(setup.encoded) == sorted(hash_of(page) for page in (0, 2, 3))
    setup.assert_stored(engine, [0, 2, 3])
    assert_empty()
    # What was dropped is not taken for stored.
    assert setup.publish([1]).succeeded is True
    setup.assert_stored(engine)


def test_what_finds_no_room_though_all_that_waits_would_be_dropped_is_refused(local_peer, set_up, delta, gate):
    setup = holding(set_up, local_peer, gate, 2)
    refused = setup.offload([1, 2, 3])
    assert refused.succeeded is False
    assert delta("kvcodec_publish_drops_total", reason="queue_full") == 3
    assert counted("kvcodec_publish_queue_bytes") == 2 * SMALL.page_bytes
    gate.set()
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert setup.encoded == [hash_of(page) for page in (0, 1)]
    assert_empty()


def test_one_offload_larger_than_the_queue_is_taken_when_nothing_else_waits(engine, local_peer, set_up):
    setup = set_up(local_peer, publish_queue_bytes=1)
    assert setup.publish().succeeded is True
    setup.assert_stored(engine)


def test_without_a_peer_pages_are_dropped_at_once(local_peer, set_up, delta):
    local_peer.stop()
    setup = set_up(local_peer, expect_up=False)
    offload = setup.offload()
    assert offload.succeeded is False
    assert setup.peer.calls == []
    assert delta("kvcodec_publish_drops_total", reason="peer_down") == 4
    assert_empty()


def test_a_read_only_server_publishes_nothing(engine, local_peer, set_up):
    setup = set_up(local_peer, read_only=True)
    assert setup.offload().succeeded is True
    assert setup.peer.calls == []
    assert engine.stat().objects == 0


def test_a_peer_that_dies_after_the_copy_and_stays_away(local_peer, set_up, delta):
    setup = set_up(local_peer, before_encode=lambda page_hash: local_peer.stop())
    assert setup.publish().succeeded is True
    assert delta("kvcodec_write_back_pages_total", outcome="kept") == 4
    assert counted("kvcodec_write_back_kept_pages") == 4
    assert set(setup.coded) == {hash_of(page) for page in range(4)}
    assert setup.offload().succeeded is False
    assert_empty()
    setup.monitor.close()
    setup.publisher.close()
    assert delta("kvcodec_publish_drops_total", reason="closed") == 4


def away(set_up, local_peer, engine, closing):
    """A publisher that has coded four pages, of which host memory has lost one; and what brings the peer back."""
    setup = set_up(local_peer, before_encode=lambda page_hash: local_peer.stop())
    setup.publish()
    del setup.coded[hash_of(2)]

    def bring_back():
        second = LocalPeer(engine, local_peer.address)
        closing.callback(second.stop)
        assert setup.monitor.wait_until_up(LIMIT_S)
        wait_until(lambda: not setup.publisher._sending.kept_pages)

    return setup, bring_back


def test_what_was_coded_while_the_peer_was_away_is_stored_when_it_is_back(engine, local_peer, set_up, delta, closing):
    setup, bring_back = away(set_up, local_peer, engine, closing)
    bring_back()
    wait_until(lambda: engine.stat().objects == 3)
    setup.assert_stored(engine, [0, 1, 3])
    assert counted("kvcodec_write_back_kept_pages") == 0
    wait_until(lambda: delta("kvcodec_published_pages_total", outcome="stored", tier="raw") == 3)
    assert delta("kvcodec_write_back_pages_total", outcome="sent") == 3
    assert delta("kvcodec_write_back_pages_total", outcome="lost") == 1
    assert delta("kvcodec_publish_drops_total", reason="peer_down") == 1
    # Each was coded once.
    assert sorted(setup.encoded) == sorted(hash_of(page) for page in range(4))
    wait_until(lambda: setup.offload([0, 1, 3]).succeeded is True)
    setup.publish([2])
    setup.assert_stored(engine)


def test_what_another_server_has_stored_meanwhile_is_not_sent(engine, local_peer, set_up, delta, closing):
    setup, bring_back = away(set_up, local_peer, engine, closing)
    key, data = NAMESPACE + hash_of(1), setup.coded[hash_of(1)]
    assert engine.put(key, data)
    puts = []
    engine.before = lambda method, key: method == "put" and puts.append(key)
    bring_back()
    wait_until(lambda: engine.stat().objects == 3)
    assert sorted(puts) == sorted(NAMESPACE + hash_of(page) for page in (0, 3))
    assert delta("kvcodec_write_back_pages_total", outcome="sent") == 2


def test_a_peer_that_goes_again_while_it_gets_what_was_kept(engine, local_peer, set_up, delta, closing):
    setup, bring_back = away(set_up, local_peer, engine, closing)
    refused = []

    def fail_once(call):
        if call == "put" and not refused:
            refused.append(call)
            raise PeerUnavailableError("gone again")

    setup.peer.before = fail_once
    bring_back()
    wait_until(lambda: engine.stat().objects == 3)
    setup.assert_stored(engine, [0, 1, 3])
    assert refused


def test_a_peer_that_stops_in_the_middle_of_a_put_and_comes_back(engine, local_peer, set_up, closing, delta):
    setup = set_up(local_peer, timeouts=PATIENT)
    puts = []

    def die(method, key):
        if method == "put":
            puts.append(key)
            if len(puts) == 2:
                local_peer.begin_stop()

    engine.before = die
    failed = threading.Event()
    tell = setup.monitor.failed
    setup.monitor.failed = lambda rpc, error: (tell(rpc, error), failed.set())
    offload = setup.offload()
    assert offload.wait(LIMIT_S)
    assert failed.wait(LIMIT_S)
    local_peer.stop()
    second = LocalPeer(engine, local_peer.address)
    closing.callback(second.stop)
    assert setup.publisher.wait_until_empty(LIMIT_S)
    setup.assert_stored(engine)
    assert delta("kvcodec_publish_drops_total", reason="peer_down") == 0
    assert_empty()


def test_a_peer_process_that_is_killed_before_a_put_and_restarted(set_up, connect, tmp_path):
    with PeerProcess(store=f"lmdb:{tmp_path}", capacity="64MiB") as process:
        setup = set_up(process, timeouts=PATIENT)
        killed = []

        def kill(call):
            if call == "put" and not killed:
                killed.append(process.kill())

        setup.peer.before = kill
        failed = threading.Event()
        tell = setup.monitor.failed
        setup.monitor.failed = lambda rpc, error: (tell(rpc, error), failed.set())
        offload = setup.offload()
        assert offload.wait(LIMIT_S)
        assert failed.wait(LIMIT_S)
        process.restart()
        assert setup.publisher.wait_until_empty(LIMIT_S)
        lookup = setup.peer.lookup(NAMESPACE, [hash_of(page) for page in range(4)])
        assert lookup.covered_pages == 4
        assert_empty()


def test_a_peer_that_refuses_a_put_is_not_asked_again(local_peer, set_up, delta):
    setup = set_up(local_peer)

    def refuse(*args):
        raise PeerRejectedError("no")

    setup.peer.inner.put = refuse
    setup.publish([1])
    assert setup.peer.calls.count("put") == 1
    assert delta("kvcodec_publish_drops_total", reason="peer_rejected") == 1
    assert setup.monitor.is_up
    assert_empty()


def test_a_page_that_finds_no_room_at_the_peer_is_counted_and_may_be_offered_again(local_peer, set_up, delta):
    setup = set_up(local_peer)
    setup.peer.inner.put = lambda digest, objects: [PutResult(PutOutcome.NO_CAPACITY, "full") for _ in objects]
    setup.publish([1])
    assert delta("kvcodec_publish_drops_total", reason="no_capacity") == 1
    assert delta("kvcodec_published_pages_total", outcome="no_capacity", tier="raw") == 1
    assert setup.stored.missing(NAMESPACE, [hash_of(1)]) == [0]
    assert_empty()


def test_a_page_that_can_not_be_encoded_leaves_the_others_alone(engine, local_peer, set_up, delta):
    def fail(page_hash):
        if page_hash == hash_of(1):
            raise CodecError("no")
        if page_hash == hash_of(2):
            raise ZeroDivisionError

    setup = set_up(local_peer, before_encode=fail)
    assert setup.publish().succeeded is True
    setup.assert_stored(engine, [0, 3])
    assert engine.stat().objects == 2
    assert delta("kvcodec_publish_drops_total", reason="codec") == 1
    assert delta("kvcodec_publish_drops_total", reason="encode_failed") == 1
    assert_empty()


def test_pages_that_can_not_be_copied_settle_as_failed(local_peer, set_up, delta):
    setup = set_up(local_peer)
    offload = setup.publisher.offload([Target(NAMESPACE, [0])], [hash_of(0)], setup.pool.slots([0]) + 10**6, ())
    assert offload.wait(LIMIT_S)
    assert offload.succeeded is False
    assert delta("kvcodec_publish_drops_total", reason="copy_failed") == 1
    assert setup.publish([1]).succeeded is True
    assert_empty()


def test_an_unknown_error_of_a_put_is_counted_and_the_next_pages_are_sent(engine, local_peer, set_up, delta):
    setup = set_up(local_peer)
    put = setup.peer.inner.put
    setup.peer.inner.put = lambda *args: 1 / 0
    setup.publish([0])
    setup.peer.inner.put = put
    setup.publish([1])
    setup.assert_stored(engine, [1])
    assert delta("kvcodec_publish_drops_total", reason="send_failed") == 1
    assert_empty()


def test_close_drops_what_waits_and_settles_every_offload(local_peer, set_up, delta, gate):
    encoding = threading.Event()

    def hold(page_hash):
        encoding.set()
        assert gate.wait(LIMIT_S)

    setup = set_up(local_peer, before_encode=hold)
    offloads = [setup.offload([page]) for page in range(4)]
    assert encoding.wait(LIMIT_S)
    closer = threading.Thread(target=setup.publisher.close)
    closer.start()
    assert setup.publisher._closed.wait(LIMIT_S)
    gate.set()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert all(offload.succeeded is not None for offload in offloads)
    assert not [thread for thread in setup.publisher._threads if thread.is_alive()]
    assert delta("kvcodec_publish_drops_total", reason="closed") == 4
    assert setup.offload([0]).succeeded is False
    assert_empty()


def test_close_does_not_wait_for_a_peer_that_is_away(local_peer, set_up, monkeypatch):
    setup = set_up(local_peer, timeouts=dataclasses.replace(TIMEOUTS, retry_s=1000))
    setup.peer.inner.put = lambda *args: (_ for _ in ()).throw(PeerUnavailableError("gone"))
    waiting = threading.Event()
    wait = setup.monitor.wait_until_up

    def told(timeout_s):
        if not setup.monitor.is_up:
            waiting.set()
        return wait(timeout_s)

    setup.peer.before = lambda call: call == "lookup" and local_peer.stop()
    setup.monitor.wait_until_up = told
    offload = setup.offload()
    assert offload.wait(LIMIT_S)
    assert waiting.wait(LIMIT_S)
    setup.monitor.close()
    setup.publisher.close()
    assert not [thread for thread in setup.publisher._threads if thread.is_alive()]
    assert_empty()


def test_pages_at_the_start_of_a_prompt_are_coded_before_later_ones_of_others(engine, local_peer, set_up, gate):
    begun = threading.Event()

    def hold(page_hash):
        begun.set()
        gate.wait(LIMIT_S)

    setup = set_up(local_peer, before_encode=hold, encode_threads=1, encoder_processes=0)
    assert setup.offload([0]).wait(LIMIT_S)
    assert begun.wait(LIMIT_S)
    # An hour of tokens.
    late = setup.offload([1], first_position=3_600_000)
    assert late.wait(LIMIT_S)
    assert setup.offload([2, 3]).wait(LIMIT_S)
    wait_until(lambda: len(setup.publisher._pages.waiting()) == 3)
    gate.set()
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert setup.encoded == [hash_of(page) for page in (0, 2, 3, 1)]
    setup.assert_stored(engine)
    assert_empty()


def test_pages_of_several_tiers_are_copied_once_and_the_best_ones_coded_first(engine, local_peer, set_up, delta, gate):
    setup = set_up(
        local_peer, before_encode=lambda page_hash: gate.wait(LIMIT_S), encode_threads=1, encoder_processes=0
    )
    gathered = []
    gather = setup.pool.wrapped.gather
    setup.pool.wrapped.gather = lambda slots, after, only: gathered.append(list(only)) or gather(slots, after, only)
    setup.stored.update(OTHER_NAMESPACE, [hash_of(3)], [True])
    offload = setup.offload_to([Target(NAMESPACE, [0, 2]), Target(OTHER_NAMESPACE, [0, 1, 3])])
    assert offload.wait(LIMIT_S)
    wait_until(lambda: len(setup.publisher._pages.waiting()) == 3)
    assert counted("kvcodec_publish_queue_bytes") == 4 * SMALL.page_bytes
    gate.set()
    assert setup.publisher.wait_until_empty(LIMIT_S)
    assert gathered == [[0, 1, 2]]
    assert setup.encoded == [hash_of(page) for page in (0, 2, 0, 1)]
    setup.assert_stored(engine, [0, 2])
    setup.assert_stored(engine, [0, 1], OTHER_NAMESPACE)
    assert engine.stat().objects == 4
    assert delta("kvcodec_published_pages_total", outcome="stored", tier="raw") == 2
    assert delta("kvcodec_published_pages_total", outcome="stored", tier="other") == 2
    # Host memory keeps the best.
    assert setup.coded == {hash_of(page): engine.get(NAMESPACE + hash_of(page)) for page in (0, 2)}
    assert_empty()
