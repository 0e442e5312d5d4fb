import logging
import types

import pytest
import torch

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.planner import FetchPlan
from sglang_kvcodec.plugin.radix_cache import KVCodecRadixCache, _Held, build_radix_cache
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime


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


class Rank:
    """What a rank's cache knows of its fetches, and what the other ranks say of theirs."""

    def __init__(self, *tickets):
        self._held = {i: _Held(ticket, 0, ticket.page_hashes) for i, ticket in enumerate(tickets)}
        self.scheduler_time = SchedulerTime()
        self.sent = None
        self.others = None

    def _all_reduce_attn_groups(self, tensor, op):
        assert op is torch.distributed.ReduceOp.MIN
        self.sent = tensor.clone()
        if self.others is not None:
            tensor.copy_(torch.minimum(tensor, self.others))

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


def test_ranks_that_plan_differently_agree_on_what_all_have():
    # One has two requests' pages, the other still fetches for the second.
    mine, other = Rank(ticket(4), ticket(3)), Rank(ticket(1), ticket(0, planned=2, done=False))
    mine.others, other.others = torch.tensor([[1, -1], [1, 2]]), torch.tensor([[4, 3], [4, 3]])
    assert mine.agreed() == other.agreed() == [1, None]
    assert mine.sent.tolist() == other.others.tolist()
    assert other.sent.tolist() == [[1, -1], [1, 2]]


def test_nobody_waits_for_a_fetch_of_which_a_rank_will_have_nothing():
    waiting = ticket(0, planned=5, done=False)
    rank = Rank(waiting, ticket(0, planned=4, done=False))
    # The other rank has decided to compute the first, and is not done with the second.
    rank.others = torch.tensor([[0, -1], [0, 2]])
    assert rank.agreed() == [0, None]
    assert waiting.is_cancelled
    rank.others = torch.tensor([[-1], [0]])
    assert rank.agreed() == [0, 0]
