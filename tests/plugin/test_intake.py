"""What a request that is queued comes to wait for. The tree, the scheduler and the fetcher are stand-ins."""

import types

import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.plugin.held_requests import HeldRequests
from sglang_kvcodec.plugin.intake import Intake
from sglang_kvcodec.plugin.passes import PassObserver
from sglang_kvcodec.plugin.retry import RetryBook
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime

PAGE = 16
PAGES = 8
PROMPT_TOKENS = PAGE * PAGES + 3


class Request:
    def __init__(self, rid):
        self.rid = rid


class Batch(list):
    def is_empty(self):
        return not self


class Setup:
    def __init__(self, stages=1):
        self.scheduler = types.SimpleNamespace(
            running_batch=Batch(),
            chunked_req=None,
            waiting_queue=[],
            enable_priority_scheduling=False,
            chunked_prefill_size=256,
            truncation_align_size=None,
            _prefetch_kvcache=lambda req: self.looked_up.append(req.rid),
        )
        self.host_pages = 0
        self.cache = types.SimpleNamespace(
            page_size=PAGE,
            pp_size=stages,
            scheduler=self.scheduler,
            linker=types.SimpleNamespace(hit_pages=lambda rid: self.host_pages),
            has_one_component=True,
            has_other_ranks=False,
        )
        self.tiers = ["tier"]
        self.started, self.looked_up = [], []
        config = types.SimpleNamespace(compute_while_fetching="idle", min_fetch_tokens=PAGE)
        fetcher = types.SimpleNamespace(start=self._start)
        runtime = types.SimpleNamespace(tiers=lambda: self.tiers, fetcher=fetcher, config=config, tracer=Tracer())
        linker = types.SimpleNamespace(without_bad=lambda hashes: hashes, kept=lambda hashes: ("kept",) * 2)
        self.held, self.retries = HeldRequests(), RetryBook()
        passes = PassObserver(None)
        self.intake = Intake(self.cache, runtime, linker, self.held, self.retries, passes, SchedulerTime())

    def _start(self, tiers, hashes, tokens_before, prompt_tokens, rid, may_compute, are_others):
        self.started.append((rid, len(hashes), tokens_before, may_compute, are_others))
        return FetchTicket(hashes, tokens_before, prompt_tokens, rid, may_compute)

    def queue(self, rid, matched_pages=0, text=0):
        request = Request(rid)
        self.retries.note(types.SimpleNamespace(rid=rid, mm_inputs=None, session_params=None))
        key = RadixKey(range(text, text + PAGES * PAGE), None)
        self.intake.queued(request, key, matched_pages * PAGE, PROMPT_TOKENS)
        return request


@pytest.fixture
def setup():
    return Setup()


def test_what_is_not_here_is_fetched(setup):
    setup.host_pages = 2
    request = setup.queue("r", matched_pages=3)
    assert setup.started == [("r", PAGES - 3, 3 * PAGE, True, False)]
    held = setup.held.get(request)
    assert (held.start_page, held.device_pages, len(held.before), len(held.hashes)) == (3, 1, 3, PAGES - 3)
    assert len(held.key) == PAGES * PAGE
    # It waits already.
    setup.intake.queued(request, held.key, 0, PROMPT_TOKENS)
    assert len(setup.started) == 1


@pytest.mark.parametrize("who", ["running", "chunked", "waiting"])
def test_others_want_the_model(setup, who):
    if who == "running":
        setup.scheduler.running_batch.append("req")
    elif who == "chunked":
        setup.scheduler.chunked_req = "req"
    else:
        setup.scheduler.waiting_queue.append(types.SimpleNamespace(rid="o", cache_request_handle=Request("o")))
    setup.queue("r")
    assert setup.started == [("r", PAGES, 0, False, True)]


def test_one_that_waits_for_its_pages_does_not_want_the_model(setup):
    other = setup.queue("other", text=1000)
    setup.scheduler.waiting_queue.append(types.SimpleNamespace(rid="other", cache_request_handle=other))
    assert not setup.intake.others_use_the_model()


@pytest.mark.parametrize("host_pages", [0, 2])
def test_what_is_all_here_may_have_to_be_restored(setup, host_pages):
    setup.host_pages = host_pages
    request = setup.queue("r", matched_pages=PAGES)
    assert not setup.started
    held = setup.held.get(request)
    assert (held is not None) == bool(host_pages)
    if held is not None:
        assert held.ticket.is_ready
        assert (held.pages, held.device_pages) == ([], PAGES - host_pages)


@pytest.mark.parametrize("why", ["computed", "no tiers"])
def test_nothing_is_waited_for(setup, why):
    if why == "no tiers":
        setup.tiers = []
    else:
        setup.retries.note = lambda tokenized: None
    request = setup.queue("r")
    assert request not in setup.held
    assert not setup.started


def test_who_lacks_the_same_follows_and_is_looked_up_when_it_is_there(setup):
    setup.queue("first")
    second = setup.queue("second")
    assert len(setup.started) == 1
    assert setup.held.get(second).follows
    setup.intake.computed([types.SimpleNamespace(rid="first", output_ids=[])])
    setup.intake.start_followers()
    assert second in setup.held
    setup.intake.computed([types.SimpleNamespace(rid="first", output_ids=[7])])
    setup.scheduler.waiting_queue.append(types.SimpleNamespace(rid="second"))
    setup.intake.start_followers()
    assert second not in setup.held
    assert setup.looked_up == ["second"]


def test_who_has_gone_is_not_waited_for(setup):
    setup.queue("first")
    second = setup.queue("second")
    setup.scheduler.waiting_queue.append(types.SimpleNamespace(rid="first"))
    setup.intake.nothing_runs()
    setup.intake.start_followers()
    assert second in setup.held
    setup.scheduler.waiting_queue[:] = [types.SimpleNamespace(rid="second")]
    setup.intake.nothing_runs()
    setup.intake.start_followers()
    assert setup.looked_up == ["second"]


def test_stages_of_a_pipeline_hold_the_same_requests_and_restore_nothing_ahead():
    setup = Setup(stages=2)
    request = setup.queue("r")
    held = setup.held.get(request)
    assert held.kept == ("kept",) * 2
    assert held.key is None
    assert setup.started == [("r", PAGES - 2, 2 * PAGE, False, False)]
    setup.tiers = []
    other = setup.queue("other", text=1000)
    assert len(setup.started) == 1
    assert setup.held.get(other).ticket.is_ready
