"""Fetches that are planned: with rates that are given, nothing here hangs on how fast this machine is."""

import dataclasses
import json
import threading

import pytest
from flow_kit import LIMIT_S, NAMESPACE, SMALL, Clock, new_rates, wait_until

from sglang_kvcodec.errors import ArrivalError, PeerUnavailableError
from sglang_kvcodec.flow import blocks, early_admission, exploring, fetch_planning, planner
from sglang_kvcodec.flow import fetcher as fetcher_module
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.planner import LINK_TOO_SLOW
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.flow.trace import FileTracer
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.exchange import FetchedFragment
from sglang_kvcodec.testing.pages import Pages, hash_of
from sglang_kvcodec.transform import PageTransforms

NAMES = tuple(range(6))


class Setup:
    """A planning fetcher on a peer that has six pages of some 27 kB."""

    def __init__(self, engine, connection, config):
        self.pages = Pages(SMALL, "raw", NAMESPACE)
        for name in NAMES:
            assert engine.put(self.pages.key(name), self.pages.coded(name))
        self.peer = connection.peer
        self.rates = new_rates()
        self.clock = Clock()
        self.rates.link._clock = self.clock
        self.cache = BitstreamCache(1 << 30)
        self._monitor, self._config = connection.monitor, config
        self.fetcher = self.new_fetcher()

    def new_fetcher(self, tracer=None):
        transforms = PageTransforms(SMALL, "raw")
        return Fetcher(
            self.peer, self._monitor, self.cache, StoredPages(), transforms, self._config, self.rates, tracer=tracer
        )

    def prefill_takes(self, token_s):
        """Long enough that a quarter of it is no matter of how busy this machine is: 97 tokens."""
        for tokens in (100, 1000, 5000):
            self.rates.prefill.forward_pass([tokens], [0], token_s * tokens)

    def link_carries(self, bytes_per_s):
        transfer = self.rates.link.transfer()
        transfer.received(1)
        for _ in range(20):
            self.clock.now_s += 0.06
            transfer.received(int(bytes_per_s * 0.06))
        transfer.end()

    def restoring_takes(self, byte_s):
        for size in (1000, 10_000, 100_000):
            self.rates.restore.part_ended(size, size / 2 * byte_s)

    def start(self, **given):
        return self.fetcher.start([Tier("raw", (NAMESPACE,))], [hash_of(name) for name in NAMES], rid="r", **given)

    def fetch(self, **given):
        ticket = self.start(**given)
        assert ticket.wait(LIMIT_S)
        return ticket


@pytest.fixture
def compute_while_fetching():
    return "idle"


@pytest.fixture
def setup(engine, local_peer, connect, config, closing, compute_while_fetching):
    config = dataclasses.replace(config, plan="auto", compute_while_fetching=compute_while_fetching)
    setup = Setup(engine, connect(local_peer.remote), config)
    closing.callback(setup.fetcher.close)
    return setup


def test_nothing_known_is_fetched_to_learn(setup, delta):
    ticket = setup.fetch()
    assert len(ticket.pages) == len(NAMES)
    assert ticket.plan.reason == "learning"
    assert delta("kvcodec_plans_total", reason="learning") == 1
    assert setup.rates.link.round_trip_s > 0


@pytest.mark.parametrize("are_others", [False, True])
def test_plans_know_whether_others_use_the_model(setup, monkeypatch, are_others):
    known = []
    plan = fetch_planning.plan_tiers
    monkeypatch.setattr(
        fetch_planning,
        "plan_tiers",
        lambda choices, *args: known.extend(choice.known for choice in choices) or plan(choices, *args),
    )
    setup.fetch(are_others=are_others)
    assert [each.are_others for each in known] == [are_others]


def test_a_fast_link_is_used(setup, delta):
    setup.prefill_takes(0.2)
    setup.link_carries(1e8)
    setup.restoring_takes(1e-9)
    ticket = setup.fetch()
    assert len(ticket.pages) == len(NAMES)
    assert ticket.plan.reason == "whole_prefix"
    assert ticket.plan.ttft_s < ticket.plan.prefill_s


def test_what_a_request_does_is_traced(setup, tmp_path, closing):
    setup.fetcher.close()
    tracer = FileTracer(tmp_path / "t.json", "a server")
    setup.fetcher = setup.new_fetcher(tracer)
    setup.peer.on_event = lambda event: setattr(setup.clock, "now_s", setup.clock.now_s + 0.01)
    ticket = setup.fetch()
    setup.fetcher.close()
    tracer.close()
    events = json.loads((tmp_path / "t.json").read_text())
    begun = {event["name"]: event["args"] for event in events if event["ph"] == "b" and event["id"] == "r"}
    assert list(begun) == ["lookup queue", "lookup", "plan", "fetch queue", "wire"]
    assert begun["lookup"] == {"asked_pages": len(NAMES), "stored_pages": len(NAMES)}
    assert begun["plan"]["reason"] == "learning"
    assert begun["plan"]["words"] == ticket.plan.words
    assert begun["wire"] == {"bytes": sum(map(len, ticket.pages)), "pages": len(NAMES)}
    assert [event["args"]["bytes_per_s"] > 0 for event in events if event["ph"] == "C"] == [True]


def test_a_slow_link_is_not(setup, delta):
    setup.prefill_takes(0.2)
    setup.link_carries(1e2)
    ticket = setup.fetch()
    assert ticket.pages == []
    assert ticket.plan.reason == LINK_TOO_SLOW
    assert ticket.most_pages == 0
    assert delta("kvcodec_misses_total", reason=LINK_TOO_SLOW) == len(NAMES)
    setup.fetcher.close()
    # What is known of the link is new.
    assert setup.peer.calls == ["lookup"]
    assert delta("kvcodec_explorations_total") == 0


def test_a_link_that_has_become_fast_is_found_out_without_a_request_that_waits(setup, delta, gate):
    setup.prefill_takes(0.2)
    setup.link_carries(1e2)
    setup.clock.now_s += exploring.PAUSE_S
    setup.peer.before = lambda call: call == "fetch" and gate.wait(LIMIT_S)
    setup.peer.on_event = lambda event: setattr(setup.clock, "now_s", setup.clock.now_s + 1e-4)
    ticket = setup.fetch()
    assert ticket.plan.reason == LINK_TOO_SLOW
    assert ticket.pages == []
    setup.peer.before = lambda call: None
    gate.set()
    setup.restoring_takes(1e-9)
    deadline = threading.Event()
    while setup.rates.link.bytes_per_s() < 1e6:
        assert not deadline.wait(0.01)
    assert delta("kvcodec_explorations_total") == 1
    assert setup.fetch().plan.reason == "whole_prefix"
    # What the exploration has brought is of use, too.
    assert hash_of(0) in setup.cache


def test_an_unknown_link_that_turns_out_to_be_slow_is_given_up_on_the_way(setup, delta):
    setup.prefill_takes(0.2)
    setup.restoring_takes(1e-9)
    tickets = []
    begun = threading.Event()

    def crawl(event):
        # The second message is a long time coming.
        if isinstance(event, FetchedFragment) and event.page_index == 0:
            setup.clock.now_s += 3000
            begun.wait(LIMIT_S)
            assert tickets[0].stop.wait(LIMIT_S)

    setup.peer.inner._max_message_bytes = 1
    setup.peer.on_event = crawl
    tickets.append(setup.start())
    begun.set()
    (ticket,) = tickets
    assert ticket.wait(LIMIT_S)
    assert ticket.plan.reason == "learning"
    assert ticket.cut_phase == "progress"
    assert len(ticket.pages) < len(NAMES)
    assert delta("kvcodec_fetch_cuts_total", phase="progress") == 1
    assert delta("kvcodec_fetches_total", outcome="overtaken") == 1
    assert delta("kvcodec_peer_errors_total", rpc="fetch", reason="peer_timeout") == 0


@pytest.mark.parametrize(("call", "phase"), [("lookup", "lookup"), ("fetch", "first_byte")])
def test_a_request_does_not_wait_for_an_answer_longer_than_it_is_worth(setup, delta, gate, call, phase):
    setup.prefill_takes(0.2)
    setup.peer.before = lambda name: name == call and gate.wait(LIMIT_S)
    ticket = setup.fetch()
    assert not gate.is_set()
    assert ticket.pages == []
    assert delta("kvcodec_fetch_cuts_total", phase=phase) == 1
    assert delta("kvcodec_fetches_total", outcome="overtaken") == 1
    ticket.cancel()
    gate.set()
    setup.fetcher.close()
    # Nobody takes what came too late from the ticket; what it taught remains.
    assert ticket.pages == []
    assert setup.rates.link.round_trip_s > 0
    assert delta("kvcodec_fetches_total", outcome="overtaken") == 1


def test_a_request_does_not_wait_for_a_thread_longer_than_it_is_worth(setup, delta, gate, monkeypatch):
    monkeypatch.setattr(fetcher_module, "LOOKUP_THREADS", 1)
    setup.fetcher.close()
    setup.fetcher = setup.new_fetcher()
    setup.prefill_takes(0.2)
    setup.peer.before = lambda name: gate.wait(LIMIT_S)
    tickets = [setup.start(), setup.start()]
    assert all(ticket.wait(LIMIT_S) for ticket in tickets)
    assert not gate.is_set()
    assert delta("kvcodec_fetch_cuts_total", phase="lookup") == 2
    gate.set()
    setup.fetcher.close()
    # The second was not even begun.
    assert setup.peer.calls == ["lookup"]


def test_pages_are_fetched_in_blocks_so_that_what_came_before_a_cut_is_whole(setup, delta, monkeypatch):
    monkeypatch.setattr(blocks, "FIRST_BLOCK_BYTES", 2 * len(setup.pages.coded(0)) + 1)
    monkeypatch.setattr(blocks, "LAST_BLOCKS", 1.5)
    ticket = setup.fetch()
    assert len(ticket.pages) == len(NAMES)
    assert setup.peer.calls.count("fetch") == 3


class Held:
    """Holds a fetch after a number of messages, at a moment of which the rates are given."""

    def __init__(self, setup, events, bytes_per_s):
        self.go_on = threading.Event()
        self._setup, self._events, self._bytes_per_s = setup, events, bytes_per_s
        self._seen = 0
        self.error = None
        setup.peer.on_event = self

    def __call__(self, event):
        self._seen += 1
        if isinstance(event, FetchedFragment):
            self._setup.clock.now_s += len(event.data) / self._bytes_per_s
        if self._seen == self._events:
            assert self.go_on.wait(LIMIT_S)
            if self.error is not None:
                raise self.error


@pytest.fixture
def held(setup, monkeypatch):
    """Six pages of which a few messages have come; restoring them takes far longer than the rest will.

    So much longer that how busy this machine is, which a fetch sees as its link, is no matter.
    """
    monkeypatch.setattr(early_admission, "PERIOD_S", 0.0)
    monkeypatch.setattr(early_admission, "WATCH_S", 0.0)
    setup.peer.inner._max_message_bytes = 8 << 10
    setup.prefill_takes(20)
    setup.link_carries(1e8)
    setup.restoring_takes(1e-4)
    held = Held(setup, 12, 1e8)
    yield held
    held.go_on.set()


def test_a_request_is_ready_when_what_is_missing_will_be_in_time(setup, held, delta):
    ticket = setup.start()
    wait_until(lambda: ticket.is_ready)
    assert not ticket.is_done
    assert ticket.most_pages == len(ticket.pages) == len(NAMES)
    assert delta("kvcodec_early_admissions_total") == 1
    landed = []
    for page in ticket.pages:
        page.when_landed(0, landed.append)
    assert len(landed) < len(NAMES)
    # In a batch, it still needs what comes.
    ticket.admitted()
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert landed == [None] * len(NAMES)
    assert all(page.is_whole for page in ticket.pages)
    assert [bytes(page._data) for page in ticket.pages] == [setup.pages.coded(name) for name in NAMES]
    assert delta("kvcodec_misses_total", reason="whole_prefix") == 0
    assert all(hash_of(name) in setup.cache for name in NAMES)


def test_with_a_link_that_is_slower_than_restoring_it_waits(setup, held, delta):
    setup.link_carries(1e3)
    ticket = setup.start()
    wait_until(lambda: held._seen == 12)
    assert not ticket.is_ready
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert len(ticket.pages) == len(NAMES)


def test_an_operator_can_have_it_wait_for_all(setup, held, delta):
    setup.fetcher.close()
    setup._config = dataclasses.replace(setup._config, admit="landed")
    setup.fetcher = setup.new_fetcher()
    ticket = setup.start()
    wait_until(lambda: held._seen == 12)
    assert not ticket.is_ready
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert delta("kvcodec_early_admissions_total") == 0


def test_what_was_promised_and_does_not_come_is_told(setup, held, delta):
    ticket = setup.start()
    wait_until(lambda: ticket.is_ready)
    told = []
    for page in ticket.pages:
        page.when_landed(0, told.append)
    ticket.admitted()
    held.error = PeerUnavailableError("gone")
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert len(told) == len(NAMES)
    assert {type(error) for error in told} == {type(None), ArrivalError} or {type(e) for e in told} == {ArrivalError}
    # Its request is computed: nothing of it was of use.
    assert delta("kvcodec_misses_total", reason="peer_unavailable") == len(NAMES)
    assert len(ticket.pages) == len(NAMES)


def test_a_promise_that_takes_too_long_is_given_up_whoever_plans(setup, held, delta):
    setup.fetcher.close()
    setup._config = dataclasses.replace(setup._config, plan="always")
    setup.fetcher = setup.new_fetcher()
    ticket = setup.start()
    wait_until(lambda: ticket.is_ready)
    # Silence: what is on its way counts as not moving.
    setup.clock.now_s += 300_000
    wait_until(lambda: ticket.was_cut())
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert not ticket.is_kept


def test_an_aborted_request_ends_its_fetch_although_it_was_promised(setup, held):
    ticket = setup.start()
    wait_until(lambda: ticket.is_ready)
    ticket.cancel()
    held.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert not all(page.is_whole for page in ticket.pages)


def test_fetches_that_wait_for_a_thread_take_turns_by_length(setup, gate, monkeypatch):
    monkeypatch.setattr(fetcher_module, "FETCH_THREADS", 1)
    setup.fetcher.close()
    setup._config = dataclasses.replace(setup._config, plan="always")
    setup.fetcher = setup.new_fetcher()
    # Ten seconds for each page.
    setup.link_carries(len(setup.pages.coded(0)) / 10)
    begun = threading.Event()
    fetched = []

    def before(call):
        if call == "fetch":
            begun.set()
            gate.wait(LIMIT_S)

    setup.peer.before = before
    along = Transfers.along
    monkeypatch.setattr(
        Transfers,
        "along",
        lambda self, course, wanted, *args: fetched.append(len(wanted)) or along(self, course, wanted, *args),
    )

    def start(pages):
        return setup.fetcher.start([Tier("raw", (NAMESPACE,))], [hash_of(name) for name in NAMES[:pages]])

    tickets = [start(5)]
    assert begun.wait(LIMIT_S)
    tickets += [start(6), start(2), start(4), start(1)]
    # All but the first have been looked up, and know how much there is.
    wait_until(lambda: len(setup.fetcher._queue) == 4)
    assert [ticket.stored_pages for ticket in tickets] == [5, 6, 2, 4, 1]
    # Somebody of whom nothing is stored waits for none of them.
    stranger = setup.fetcher.start([Tier("raw", (NAMESPACE,))], [hash_of("stranger")])
    assert stranger.wait(LIMIT_S)
    assert stranger.stored_pages == 0
    assert not gate.is_set()
    gate.set()
    assert all(ticket.wait(LIMIT_S) for ticket in tickets)
    assert fetched == [5, 1, 2, 4, 6]


def both_ends(setup):
    """A request whose start may be computed meanwhile, on a link that is as fast as computing.

    Both take a second: what a lookup takes on a busy machine is little beside it.
    """
    setup.prefill_takes(1e-2)
    setup.link_carries(170_000)
    setup.restoring_takes(1e-10)
    tiers, hashes = [Tier("raw", (NAMESPACE,))], [hash_of(name) for name in NAMES]
    return setup.fetcher.start(tiers, hashes, rid="r", may_compute=True)


def test_a_request_goes_on_at_once_where_its_start_is_computed_meanwhile(setup, delta, gate):
    setup.peer.before = lambda call: call == "fetch" and gate.wait(LIMIT_S)
    ticket = both_ends(setup)
    assert ticket.wait(LIMIT_S)
    assert ticket.plan.reason == planner.BOTH_ENDS
    assert ticket.pages == []
    assert ticket.most_pages == ticket.tail.end == len(NAMES)
    assert delta("kvcodec_fetches_total", outcome=planner.BOTH_ENDS) == 1
    # What becomes of the pages is not known yet.
    assert delta("kvcodec_misses_total", reason=planner.BOTH_ENDS) == 0
    ticket.admitted()
    assert not ticket.is_cancelled
    gate.set()
    wait_until(lambda: not setup.fetcher._pacer._flights)
    fetched = [name for name in NAMES if setup.cache.get(hash_of(name)) is not None]
    assert fetched == list(NAMES[NAMES.index(fetched[0]) :])
    assert fetched[0] >= ticket.tail.lowest_page


def test_the_end_of_a_prefix_is_not_fetched_for_a_request_that_is_gone(setup, delta, gate):
    setup.peer.before = lambda call: call == "fetch" and gate.wait(LIMIT_S)
    ticket = both_ends(setup)
    assert ticket.wait(LIMIT_S)
    ticket.cancel()
    assert ticket.tail.stop.is_set()
    gate.set()
    setup.fetcher.close()
    assert setup.peer.calls.count("fetch") <= 1


def test_a_peer_that_fails_leaves_the_request_to_computing(setup, delta):
    def fail(call):
        if call == "fetch":
            raise PeerUnavailableError("it has gone")

    setup.peer.before = fail
    ticket = both_ends(setup)
    assert ticket.wait(LIMIT_S)
    setup.fetcher.close()
    assert not any(setup.cache.get(hash_of(name)) for name in NAMES)
    assert not setup.fetcher._pacer._flights


def test_nothing_is_computed_meanwhile_by_a_server_that_takes_every_hit(setup):
    setup.fetcher.close()
    setup._config = dataclasses.replace(setup._config, plan="always")
    setup.fetcher = setup.new_fetcher()
    ticket = both_ends(setup)
    assert ticket.wait(LIMIT_S)
    assert ticket.tail is None
    assert len(ticket.pages) == len(NAMES)


@pytest.fixture
def failing(setup, monkeypatch):
    """A link that is far faster than computing, and of which nothing comes any more in the middle of six blocks."""
    monkeypatch.setattr(blocks, "LAST_BLOCKS", 0)
    monkeypatch.setattr(blocks, "block_s", lambda fetch_s, round_trip_s: 1e-9)
    monkeypatch.setattr(blocks, "LATE_SHARE", -1.0)
    setup.prefill_takes(2e-2)
    setup.link_carries(1e8)
    setup.restoring_takes(1e-10)
    held = Held(setup, 7, 1e8)
    yield held
    held.go_on.set()


@pytest.mark.parametrize("compute_while_fetching", ["failing"])
def test_a_model_that_is_left_alone_while_the_link_holds(setup, gate):
    setup.peer.before = lambda call: call == "fetch" and gate.wait(LIMIT_S)
    ticket = both_ends(setup)
    wait_until(lambda: ticket.plan is not None)
    assert ticket.plan.reason != planner.BOTH_ENDS
    assert ticket.tail is None
    gate.set()
    assert ticket.wait(LIMIT_S)


def start_to_turn(setup, may_compute=True):
    hashes = [hash_of(name) for name in NAMES]
    return setup.fetcher.start([Tier("raw", (NAMESPACE,))], hashes, rid="r", may_compute=may_compute)


@pytest.mark.parametrize("compute_while_fetching", ["idle", "failing"])
def test_a_fetch_whose_link_fails_goes_on_from_the_other_end(setup, failing, delta):
    ticket = start_to_turn(setup)
    wait_until(lambda: ticket.was_cut())
    assert ticket.cut_phase == "silence"
    assert not ticket.is_ready
    asked = setup.peer.calls.count("fetch")
    assert 1 < asked < len(NAMES) - 1
    failing.go_on.set()
    assert ticket.wait(LIMIT_S)
    head = len(ticket.pages)
    assert 0 < head == asked - 1
    assert ticket.tail.head_pages == head
    assert ticket.most_pages == ticket.tail.end == len(NAMES)
    assert delta("kvcodec_fetches_turned_total") == 1
    assert delta("kvcodec_fetches_total", outcome="overtaken") == 1
    wait_until(lambda: not setup.fetcher._pacer._flights)
    fetched = [name for name in NAMES if setup.cache.get(hash_of(name)) is not None]
    # What nobody has asked for is what is computed.
    assert fetched[:head] == list(range(head))
    assert fetched[head:] == list(range(max(ticket.tail.lowest_page, head + 1), len(NAMES)))
    assert setup.fetcher._queue.enter()


def test_a_request_that_can_not_be_computed_meanwhile_waits_as_long_as_it_is_worth(setup, failing, delta):
    ticket = start_to_turn(setup, may_compute=False)
    wait_until(lambda: failing._seen == 7)
    assert not threading.Event().wait(0.3)
    assert not ticket.was_cut()
    failing.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert len(ticket.pages) == len(NAMES)
    assert delta("kvcodec_fetches_turned_total") == 0


def test_what_was_promised_leaves_a_tail_for_the_second_start(setup, failing, delta, monkeypatch):
    monkeypatch.setattr(early_admission, "is_in_time", lambda *args: True)
    monkeypatch.setattr(early_admission, "PERIOD_S", 0.0)
    monkeypatch.setattr(early_admission, "WATCH_S", 0.0)
    ticket = start_to_turn(setup)
    wait_until(lambda: ticket.is_ready)
    assert not ticket.is_done
    ticket.admitted()
    wait_until(lambda: ticket.was_cut())
    failing.go_on.set()
    assert ticket.wait(LIMIT_S)
    assert not ticket.is_kept
    assert ticket.tail is None
    second = ticket.second
    assert second.is_done
    assert second.pages == []
    assert second.tail.head_pages > 0
    assert delta("kvcodec_fetches_turned_total") == 1
    wait_until(lambda: not setup.fetcher._pacer._flights)
    assert setup.cache.get(hash_of(NAMES[-1])) is not None
    ticket.cancel()
    assert second.tail.stop.is_set()
