"""The book of tails: slots are set aside, joined once, and given back, whatever happens. The pools are stand-ins."""

import types

import pytest
from flow.flow_kit import Delta
from plugin.pool_kit import Cache, Restorer, set_aside

from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.planner import BOTH_ENDS
from sglang_kvcodec.flow.prediction import Prefix
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.plugin.set_aside import MAX_POOL_SHARE
from sglang_kvcodec.plugin.tails import NO_TAIL, TailBook

PAGE = 16
PAGES = 10
START = 3
"""Of the prompt, that many pages were there before."""
GROUP = types.SimpleNamespace(index=0)


class Setup:
    def __init__(self, size=1000):
        self.cache = Cache(size)
        restorer = Restorer()
        self.restores = restorer.restores
        self.bad, self.joined = [], []
        self.others = None
        self.others_idle = 1
        self.aside = set_aside(self.cache, restorer, self.smallest, self.bad.extend)
        self.book = TailBook(
            self.cache,
            self.aside,
            PAGE,
            self.smallest,
            self.joined.append,
            Tracer(),
        )
        self.ticket = FetchTicket([bytes(32)] * PAGES)
        self.ticket.tail = Tail(Prefix([100] * PAGES, PAGE, START * PAGE, (START + PAGES) * PAGE + 5), 4, 2 * PAGE)
        self.tail = self.ticket.tail
        self.req = types.SimpleNamespace(
            rid="r", kv=types.SimpleNamespace(req_pool_idx=7), extend_end=0, cached_tokens_storage=0
        )
        self.all_slots = set(self.cache.token_to_kv_pool_allocator.free_slots)

    def smallest(self, mine):
        if len(mine) == 1:
            # Asked whether slots are written no more.
            return [min(mine[0], self.others_idle)]
        return list(mine) if self.others is None else [min(pair) for pair in zip(mine, self.others, strict=True)]

    def begin(self):
        self.book.agreed("r", self.ticket, START, TailBook.offer(self.ticket))
        self.book.admitted("r")

    def land(self, first, count):
        header = types.SimpleNamespace(group_ranges=[0])
        self.tail.landed(first, [types.SimpleNamespace(header=header) for _ in range(count)])

    def restored(self, first, count):
        self.land(first, count)
        self.restores[-1].on_layers(GROUP, [])

    def launch(self, until_page):
        """A pass is launched up to a page of the tail's, and then looked at."""
        self.req.extend_end = (START + until_page) * PAGE
        self.book.launched("r", self.req.extend_end, is_last=False)
        return self.book.join(self.req, self.req.extend_end)

    @property
    def has_pending(self):
        return self.book.has_pending or self.aside.has_pending

    @property
    def free(self):
        return set(self.cache.token_to_kv_pool_allocator.free_slots)


@pytest.fixture
def delta():
    return Delta()


@pytest.fixture
def setup():
    return Setup()


def test_a_request_goes_on_behind_what_is_restored(setup, delta):
    setup.begin()
    assert len(setup.free) == 1000 - 8 * PAGE
    setup.restored(5, 5)
    assert setup.launch(4) == (START + 4) * PAGE
    end = (START + PAGES) * PAGE
    assert setup.launch(6) == end
    assert setup.req.extend_end == setup.req.kv.kv_allocated_len == setup.req.kv.kv_committed_len == end
    assert setup.req.cached_tokens_storage == 4 * PAGE
    ((place, slots),) = setup.cache.written.items()
    assert place == ((START + 6) * PAGE, end)
    assert len(setup.joined[0]) == 4
    # The others are free again: two pages were computed as well, and what lies below them was not fetched.
    assert setup.free == setup.all_slots - set(slots)
    assert not setup.has_pending
    assert delta("kvcodec_joined_tokens_total") == 4 * PAGE
    assert delta("kvcodec_meetings_total", outcome="joined") == 1
    assert delta("kvcodec_misses_total", reason=BOTH_ENDS) == PAGES - 4


def test_passes_are_short_and_end_where_pages_are_about_to_land(setup):
    assert setup.book.most_tokens("r", 0) is None
    setup.begin()
    assert setup.book.most_tokens("r", START * PAGE) == 2 * PAGE
    setup.restored(5, 5)
    setup.launch(4)
    assert setup.book.most_tokens("r", (START + 4) * PAGE) == PAGE


def test_where_nothing_comes_the_last_pass_is_no_shorter_for_the_tail(setup):
    setup.begin()
    setup.launch(PAGES - 1)
    assert setup.book.most_tokens("r", (START + PAGES - 1) * PAGE) == 2 * PAGE


def test_all_ranks_join_at_once(setup):
    setup.begin()
    setup.restored(5, 5)
    # Another rank has the last three pages only.
    setup.others = [-7, 7]
    assert setup.launch(6) == (START + 6) * PAGE
    assert setup.book.most_tokens("r", (START + 6) * PAGE) == PAGE
    assert setup.launch(7) == (START + PAGES) * PAGE


def test_a_tail_that_not_all_ranks_have_ends(setup, delta):
    setup.book.agreed("r", setup.ticket, START, [-NO_TAIL, 0, 0, 0])
    assert setup.tail.stop.is_set()
    assert setup.book.most_tokens("r", 0) is None
    assert delta("kvcodec_meetings_total", outcome="not_all_ranks") == 1
    assert setup.free == setup.all_slots


def test_a_turned_fetch_has_a_head_that_nobody_computes(setup, delta):
    setup.ticket.tail = setup.tail = Tail(setup.tail.prefix, 7, 2 * PAGE, head_pages=4)
    assert TailBook.offer(setup.ticket) == (-7, PAGES, 2 * PAGE, -4)
    # Another rank has a page more.
    setup.book.agreed("r", setup.ticket, START, [-7, PAGES, 2 * PAGE, -5])
    setup.book.admitted("r")
    assert setup.tail.lowest_page == 6
    assert len(setup.free) == 1000 - 4 * PAGE
    setup.restored(6, 4)
    end = (START + PAGES) * PAGE
    assert setup.launch(7) == end
    assert delta("kvcodec_misses_total", reason=BOTH_ENDS) == PAGES - 5 - 3


@pytest.mark.parametrize("offer", [[-7, PAGES, 32, -7], [-PAGES, PAGES, 32, 0]])
def test_nothing_is_between_a_head_and_a_tail_that_touch(setup, delta, offer):
    setup.book.agreed("r", setup.ticket, START, offer)
    assert setup.tail.stop.is_set()
    assert delta("kvcodec_meetings_total", outcome="not_all_ranks") == 1


@pytest.mark.parametrize("is_restoring", [False, True])
def test_slots_are_given_back_when_nothing_writes_to_them_any_more(setup, is_restoring, delta):
    setup.begin()
    if is_restoring:
        setup.land(5, 5)
    setup.book.close("r")
    assert delta("kvcodec_meetings_total", outcome="gone") == 1
    setup.aside.reap()
    assert setup.has_pending == is_restoring
    if is_restoring:
        assert setup.free != setup.all_slots
        setup.restores[0].on_layers(GROUP, [])
        setup.aside.reap()
    assert not setup.has_pending
    assert setup.free == setup.all_slots


def test_pages_that_can_t_be_restored_are_told_of(setup):
    setup.begin()
    setup.land(5, 5)
    setup.restores[0].bad_pages = ["bad"]
    setup.restores[0].on_failure(RuntimeError())
    assert setup.launch(6) == (START + 6) * PAGE
    assert setup.launch(PAGES) == (START + PAGES) * PAGE
    assert setup.bad == ["bad"]
    assert not setup.cache.written
    assert setup.free == setup.all_slots


def test_the_last_pass_ends_a_tail(setup, delta):
    setup.begin()
    setup.restored(5, 5)
    setup.book.launched("r", (START + PAGES) * PAGE + 5, is_last=True)
    assert delta("kvcodec_meetings_total", outcome="overtaken") == 1
    assert setup.free == setup.all_slots


@pytest.mark.parametrize(
    ("size", "evictable", "fits"), [(250, 0, False), (250, 50, False), (290, 0, True), (270, 30, True)]
)
def test_the_prompt_has_room_beside_its_tail(size, evictable, fits, delta):
    setup = Setup(size)
    setup.cache.evictable = evictable
    setup.begin()
    assert delta("kvcodec_meetings_total", outcome="no_room") == (not fits)
    assert setup.has_pending == fits


def test_tails_have_a_share_of_the_pool_at_most(delta):
    setup = Setup(size=int(8 * PAGE / MAX_POOL_SHARE) - 1)
    setup.cache.evictable = 10_000
    setup.begin()
    assert delta("kvcodec_meetings_total", outcome="no_room") == 1
    assert setup.free == setup.all_slots


def test_a_flush_waits_for_restores_and_forgets_all(setup):
    setup.begin()
    setup.restored(5, 5)
    setup.book.reset()
    assert not setup.has_pending
    assert setup.tail.stop.is_set()
    assert setup.book.join(setup.req, 6 * PAGE) == 6 * PAGE


def test_all_ranks_give_slots_back_at_once(setup):
    setup.begin()
    setup.others_idle = 0
    setup.book.close("r")
    setup.aside.reap()
    assert setup.free != setup.all_slots
    assert setup.has_pending
    setup.others_idle = 1
    setup.aside.reap()
    assert setup.free == setup.all_slots
    assert not setup.has_pending
