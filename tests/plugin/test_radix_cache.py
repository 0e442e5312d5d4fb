import logging
import types

import pytest
import torch

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.plugin.radix_cache import KVCodecRadixCache, build_radix_cache


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


class Cache:
    """A cache as far as it knows of other ranks."""

    has_other_ranks = KVCodecRadixCache.has_other_ranks
    smallest_of_ranks = KVCodecRadixCache.smallest_of_ranks

    def __init__(self, group_sizes=(), monkeypatch=None):
        self.tp_world_size = 1
        self.attn_cp_group, self.attn_tp_group = group_sizes or (None, None)
        if monkeypatch is not None:
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)

    def _all_reduce_attn_groups(self, tensor, op):
        assert op is torch.distributed.ReduceOp.MIN
        tensor.copy_(torch.minimum(tensor, torch.tensor([5, 2, 3])))


@pytest.mark.parametrize(("sizes", "others"), [((), False), ((1, 1), False), ((1, 2), True), ((2, 1), True)])
def test_other_ranks_are_asked_in_every_pass(sizes, others, monkeypatch):
    # They come to the collective whether there is news here or not.
    assert Cache(sizes, monkeypatch).has_other_ranks == others


def test_ranks_of_tensor_parallelism_alone():
    cache = Cache()
    cache.tp_world_size = 2
    assert cache.has_other_ranks


def test_of_each_number_the_smallest_of_all_ranks_counts():
    assert Cache().smallest_of_ranks([4, 4, -1]) == [4, 2, -1]
