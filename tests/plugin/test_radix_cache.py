import dataclasses
import logging
import types

import pytest
import torch

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.news import News
from sglang_kvcodec.flow.planner import FetchPlan, Prefix
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.plugin.radix_cache import KVCodecRadixCache, _Held, build_radix_cache
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime
from sglang_kvcodec.plugin.tails import TailBook


@pytest.mark.parametrize(
    ("swa", "ssm", "named"),
    [
        (True, False, "sliding-window layers that have a KV pool of their own"),
        (False, True, "state-space or linear-attention layers"),
        (True, True, "state-space or linear-attention layers"),
    ],
)
def test_a_model_with_layers_of_other_kinds_is_refused_by_their_names(swa, ssm, named, caplog):
    ctx = types.SimpleNamespace(disable_radix_cache=False, is_hybrid_swa=swa, is_hybrid_ssm=ssm)
    with caplog.at_level(logging.ERROR), pytest.raises(UnsupportedError, match=named) as caught:
        build_radix_cache(ctx)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in caplog.text


@dataclasses.dataclass(frozen=True)
class Request:
    rid: str


class Rank:
    """What a rank's cache knows of its fetches, and what the other ranks say of theirs."""

    def __init__(self, *tickets):
        self._held = {Request(str(i)): _Held(ticket, 7, ticket.page_hashes, i) for i, ticket in enumerate(tickets)}
        self.scheduler_time = SchedulerTime()
        self._waiting_rids = {request.rid for request in self._held}
        self._tails = types.SimpleNamespace(agreed=lambda *args: self.tails.append(args))
        self.tails = []
        self.sent = None
        self.others = None

    def _all_reduce_attn_groups(self, tensor, op):
        assert op is torch.distributed.ReduceOp.MIN
        self.sent = tensor.clone()
        if self.others is not None:
            tensor.copy_(torch.minimum(tensor, self.others))

    _have = staticmethod(KVCodecRadixCache._have)
    _settle = KVCodecRadixCache._settle

    def agreed(self):
        KVCodecRadixCache._agree_on_fetches(self)
        return [held.agreed_pages for held in self._held.values()]


def ticket(pages, planned=None, done=True):
    made = FetchTicket([bytes(32)] * 5)
    if planned is not None:
        made.plan = FetchPlan(planned, "part")
    if done:
        made.settle([object()] * pages)
        made.finish()
    return made


def of(*rows):
    """What another rank says of its fetches, pages and most pages, where it computes none of them meanwhile."""
    return torch.tensor([[*row, *TailBook.offer(FetchTicket([]))] for row in rows])


def test_ranks_that_plan_differently_agree_on_what_all_have():
    # One has two requests' pages, the other still fetches for the second.
    mine, other = Rank(ticket(4), ticket(3)), Rank(ticket(1), ticket(0, planned=2, done=False))
    mine.others, other.others = of([1, 1], [-1, 2]), of([4, 4], [3, 3])
    assert mine.agreed() == other.agreed() == [1, None]
    assert mine._waiting_rids == other._waiting_rids == {"1"}
    assert mine.sent.tolist() == other.others.tolist()
    assert other.sent.tolist() == mine.others.tolist()


def test_ranks_compute_a_start_while_they_fetch_the_end_if_all_do():
    fetched = ticket(0)
    fetched.tail = Tail(Prefix([1] * 5, 64, 0, 400), 2, 128)
    rank = Rank(fetched)
    # The other meets later, and has one page less.
    rank.others = torch.tensor([[0, 4, -3, 4, 64]])
    assert rank.agreed() == [0]
    assert rank.sent.tolist() == [[0, 5, -2, 5, 128]]
    assert rank.tails == [("0", fetched, 7, [-3, 4, 64])]


def test_nobody_waits_for_a_fetch_of_which_a_rank_will_have_nothing():
    waiting = ticket(0, planned=5, done=False)
    rank = Rank(waiting, ticket(0, planned=4, done=False))
    # The other rank has decided to compute the first, and is not done with the second.
    rank.others = of([0, 0], [-1, 2])
    assert rank.agreed() == [0, None]
    assert waiting.is_cancelled
    rank.others = of([-1, 0])
    assert rank.agreed() == [0, 0]


class Cache:
    """A cache as far as it looks after its fetches."""

    _has_other_ranks = KVCodecRadixCache._has_other_ranks
    _has_news = KVCodecRadixCache._has_news

    def __init__(self, group_sizes=(), monkeypatch=None):
        self.tp_world_size = 1
        self.attn_cp_group, self.attn_tp_group = group_sizes or (None, None)
        self._runtime = types.SimpleNamespace(news=News())
        self._news_count = 0
        if monkeypatch is not None:
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)


def test_those_who_wait_are_looked_at_when_something_has_happened():
    cache = Cache()
    assert not cache._has_news()
    cache._runtime.news.tell()
    cache._runtime.news.tell()
    assert cache._has_news()
    assert not cache._has_news()


@pytest.mark.parametrize(("sizes", "others"), [((), False), ((1, 1), False), ((1, 2), True), ((2, 1), True)])
def test_other_ranks_are_asked_in_every_pass(sizes, others, monkeypatch):
    # They come to the collective whether there is news here or not.
    assert Cache(sizes, monkeypatch)._has_other_ranks == others


def test_ranks_of_tensor_parallelism_alone():
    cache = Cache()
    cache.tp_world_size = 2
    assert cache._has_other_ranks


def test_pages_in_host_memory_come_before_those_that_are_fetched():
    fetched = ticket(2)
    kept = (object(), object())
    assert _Held(fetched, 0, fetched.page_hashes, 0, kept).pages == [*kept, *fetched.pages]
