"""What ranks agree on for the requests that wait for their pages, whatever each of them has."""

import threading
import types

from prometheus_client import REGISTRY

from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.news import News
from sglang_kvcodec.flow.planner import FetchPlan
from sglang_kvcodec.flow.prediction import Prefix
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.plugin.held_requests import HeldRequests
from sglang_kvcodec.plugin.pipeline import NOT_YET
from sglang_kvcodec.plugin.tails import NO_TAIL

HASHES = tuple(bytes([number]) * 32 for number in range(6))
PAGES = tuple(object() for _ in HASHES)


class _Request:
    def __init__(self, rid):
        self.rid = rid


class _NothingAhead:
    """Nothing is restored before a request is in a batch."""

    def offers(self, several):
        return [(0, 0) for _ in several]

    def agreed(self, request, held, pages, offer):
        assert offer == [0, 0]
        return False


class _Rank:
    """One rank and what it holds; all ranks hold the same."""

    def __init__(self, *tickets):
        self.held, self.told = HeldRequests(), []
        self.requests = [_Request(str(number)) for number in range(len(tickets))]
        self.tickets = tickets
        for request, each in zip(self.requests, self.tickets, strict=True):
            self.held.hold(request, each, 7, HASHES)

    def agreed(self, *args):
        self.told.append(args)

    ahead = _NothingAhead()

    def pages(self):
        return [self.held.get(request).agreed_pages for request in self.requests]


def ticket(pages=0, planned=None, done=True):
    made = FetchTicket(HASHES)
    if planned is not None:
        made.plan = FetchPlan(planned, "part")
    if done:
        ready(made, pages)
    return made


def ready(made, pages):
    made.settle(PAGES[:pages])
    made.finish()


def computing_to(first_page, end, pass_tokens):
    """A fetch of the end, while the start is computed."""
    made = ticket()
    made.tail = Tail(Prefix([1] * end, 64, 0, 64 * end + 80), first_page, pass_tokens)
    return made


def agree(*ranks):
    """All ranks at the same place, each on a thread of its own: they meet as in an all-reduce."""
    rows, meet = {}, threading.Barrier(len(ranks), timeout=10)

    def smallest_of_ranks(mine):
        rows[threading.get_ident()] = list(mine)
        meet.wait()
        return [min(column) for column in zip(*rows.values(), strict=True)]

    threads = [threading.Thread(target=rank.held.agree, args=(smallest_of_ranks, rank, rank.ahead)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ranks_that_plan_differently_agree_on_what_all_have():
    # One has two requests' pages, the other still fetches for the second.
    mine, other = _Rank(ticket(4), ticket(3)), _Rank(ticket(1), ticket(planned=2, done=False))
    agree(mine, other)
    assert mine.pages() == other.pages() == [1, None]
    assert mine.held.waiting_rids == other.held.waiting_rids == {"1"}
    assert mine.held.pages_of("0") == {HASHES[0]: PAGES[0]}
    assert mine.held.pages_of("1") == {}

    ready(other.tickets[1], 5)
    agree(mine, other)
    assert mine.pages() == other.pages() == [1, 3]
    assert not mine.held.waiting_rids


def test_ranks_compute_a_start_while_they_fetch_the_end_if_all_do():
    # The other meets later, and has one page less.
    mine, other, without = _Rank(computing_to(2, 5, 128)), _Rank(computing_to(3, 4, 64)), _Rank(ticket())
    agree(mine, other)
    assert mine.pages() == other.pages() == [0]
    assert mine.told == [("0", mine.tickets[0], 7, [-3, 4, 64, 0])]
    alone = _Rank(computing_to(2, 5, 128))
    agree(alone, without)
    assert alone.told == [("0", alone.tickets[0], 7, [-NO_TAIL, 0, 0, 0])]


def test_nobody_waits_for_a_fetch_of_which_a_rank_will_have_nothing():
    # The other rank has decided to compute the first, and is not done with the second.
    mine = _Rank(ticket(planned=5, done=False), ticket(planned=4, done=False))
    other = _Rank(ticket(0), ticket(planned=2, done=False))
    agree(mine, other)
    assert mine.pages() == other.pages() == [0, None]
    assert [each.is_cancelled for each in mine.tickets] == [True, False]
    other.tickets[1].plan = FetchPlan(0, "link_too_slow")
    agree(mine, other)
    assert mine.pages() == [0, 0]


def waiting():
    return REGISTRY.get_sample_value("kvcodec_held_requests")


def test_requests_are_counted_while_they_wait_for_their_pages():
    rank = _Rank(ticket(1), ticket(planned=4, done=False), ticket(planned=4, done=False))
    assert waiting() == 3
    agree(rank)
    assert waiting() == 2
    rank.held.let_go(rank.requests[0])
    assert waiting() == 2
    rank.held.let_go(rank.requests[1])
    assert waiting() == 1
    rank.held.clear()
    assert waiting() == 0


def test_what_is_settled_is_not_agreed_on_again():
    rank = _Rank(ticket(2))
    agree(rank)
    rank.held.agree(lambda mine: 1 / 0, rank, rank.ahead)
    assert rank.pages() == [2]


def test_stages_count_the_pages_that_they_have_kept():
    held, ticket = HeldRequests(), FetchTicket(HASHES[2:], 192, 600, "a")
    request, seen = _Request("a"), []

    def decide(fetches, first_offload, offloads):
        seen.append(fetches)
        return [4 if fetches[0].pages != NOT_YET else NOT_YET], [True]

    held.hold(request, ticket, 1, HASHES, kept=PAGES[:2])
    pipeline = types.SimpleNamespace(agree=decide)
    assert held.agree_in_pipeline(pipeline, 0, []) == [True]
    assert held.waiting_rids == {"a"}
    assert held.pages_of("a") == {}
    ticket.settle(PAGES[2:5])
    ticket.finish()
    held.agree_in_pipeline(pipeline, 1, [])
    assert [[(each.pages, each.most_pages) for each in fetches] for fetches in seen] == [[(NOT_YET, 6)], [(5, 5)]]
    assert held.pages_of("a") == dict(zip(HASHES[:4], PAGES[:4], strict=True))


def test_a_stage_gives_up_what_the_others_have_decided_without():
    held, ticket = HeldRequests(), FetchTicket(HASHES, 64, 600, "a")
    held.hold(_Request("a"), ticket, 1, HASHES)
    held.agree_in_pipeline(types.SimpleNamespace(agree=lambda *_: ([0], [])), 0, [])
    assert ticket.is_cancelled
    assert not held.waiting_rids


def test_a_request_that_comes_is_looked_at_even_without_news():
    held, news = HeldRequests(), News()
    assert held.has_news(news)
    assert not held.has_news(news)
    held.hold(_Request("a"), FetchTicket(HASHES, 64, 600, "a"), 1, HASHES)
    assert held.has_news(news)
    assert not held.has_news(news)
    news.tell()
    assert held.has_news(news)


def test_all_fetches_are_given_up_when_the_tree_is_emptied():
    rank = _Rank(ticket(planned=4, done=False), ticket(planned=4, done=False))
    assert rank.requests[0] in rank.held
    assert rank.held.let_go(rank.requests[0]).ticket is rank.tickets[0]
    assert rank.held.let_go(rank.requests[0]) is None
    rank.held.clear()
    assert not rank.held
    assert not rank.held.waiting_rids
    assert [ticket.is_cancelled for ticket in rank.tickets] == [False, True]
