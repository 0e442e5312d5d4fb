import pytest
import torch
from sglang.srt.mem_cache import memory_pool

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.plugin.pool import wrap_pool
from sglang_kvcodec.testing.synthetic import random_bits

TORCH_DTYPES = {dtype: getattr(torch, dtype.torch_name) for dtype in KVDtype}


def mha_pool(dtype=torch.bfloat16, **changes):
    arguments = {
        "size": 64,
        "page_size": 16,
        "dtype": dtype,
        "head_num": 3,
        "head_dim": 20,
        "layer_num": 2,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    return memory_pool.MHATokenToKVPool(**{**arguments, **changes})


@pytest.mark.parametrize("dtype", KVDtype)
def test_wraps_sglangs_own_pool(dtype):
    kv_cache = mha_pool(TORCH_DTYPES[dtype])
    pool = wrap_pool(kv_cache, 16)
    assert pool.spec == KVSpec(2, 3, 20, 16, dtype)
    slots = torch.tensor([40, *range(16, 31)])
    keys, values = (random_bits(dtype, (16, 3, 20), seed) for seed in (1, 2))
    kv_cache.k_buffer[1][slots] = keys.view(kv_cache.k_buffer[1].dtype)
    with pool.writing(Side.VALUE, 1, 1) as layers:
        pool.write(layers, values[None, None], slots)
    assert torch.equal(pool.gather(slots)[Side.KEY][0, 1].view(torch.uint8), keys.view(torch.uint8))
    stored = kv_cache.v_buffer[1][slots].contiguous()
    assert torch.equal(stored.view(torch.uint8), values.view(torch.uint8))
    untouched = torch.ones(len(kv_cache.v_buffer[1]), dtype=torch.bool)
    untouched[slots] = False
    assert not kv_cache.v_buffer[1][untouched].view(torch.uint8).any()
    assert not kv_cache.v_buffer[0].view(torch.uint8).any()


def mla_pool(dtype=torch.bfloat16, **changes):
    arguments = {
        "size": 64,
        "page_size": 16,
        "dtype": dtype,
        "kv_lora_rank": 37,
        "qk_rope_head_dim": 6,
        "layer_num": 3,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    return memory_pool.MLATokenToKVPool(**{**arguments, **changes})


@pytest.mark.parametrize("dtype", KVDtype)
def test_wraps_a_pool_of_latents_as_one_plane(dtype):
    kv_cache = mla_pool(TORCH_DTYPES[dtype])
    pool = wrap_pool(kv_cache, 16)
    assert pool.spec == KVSpec(3, 1, 43, 16, dtype, (Side.LATENT,))
    slots = torch.tensor([40, *range(16, 31)])
    latents, others = (random_bits(dtype, (16, 1, 43), seed) for seed in (1, 2))
    kv_cache.kv_buffer[1][slots] = latents.view(kv_cache.kv_buffer[1].dtype)
    with pool.writing(Side.LATENT, 2, 1) as layers:
        pool.write(layers, others[None, None], slots)
    gathered = pool.gather(slots)
    assert gathered.keys() == {Side.LATENT}
    assert torch.equal(gathered[Side.LATENT][0, 1].view(torch.uint8), latents.view(torch.uint8))
    # As the model reads them: compressed values, and with the rotated key at their end.
    whole = kv_cache.get_key_buffer(2)[slots].contiguous()
    assert torch.equal(whole.view(torch.uint8), others.view(torch.uint8))
    compressed = kv_cache.get_value_buffer(2)[slots].contiguous()
    assert torch.equal(compressed.view(torch.uint8), others[..., :37].contiguous().view(torch.uint8))
    untouched = torch.ones(len(kv_cache.kv_buffer[2]), dtype=torch.bool)
    untouched[slots] = False
    assert not kv_cache.kv_buffer[2][untouched].view(torch.uint8).any()
    assert not kv_cache.kv_buffer[0].view(torch.uint8).any()


def test_a_pool_whose_buffers_are_replaced_later_is_still_read():
    kv_cache = mha_pool()
    pool = wrap_pool(kv_cache, 16)
    kv_cache.k_buffer = [torch.full_like(layer, 7) for layer in kv_cache.k_buffer]
    assert bool((pool.gather(torch.arange(16))[Side.KEY] == 7).all())


def refusal(kv_cache):
    with pytest.raises(UnsupportedError) as caught:
        wrap_pool(kv_cache, 16)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "DSATokenToKVPool",
        "MLATokenToKVPoolFP4",
        "MHATokenToKVPoolFP4",
        "MHATokenToKVPoolMXFP8",
        "NoOpMHATokenToKVPool",
        "PageMajorMHATokenToKVPool",
        "HybridLinearKVPool",
    ],
)
def test_a_pool_of_another_kind_is_refused_by_name(name):
    kind = getattr(memory_pool, name)
    assert name in refusal(kind.__new__(kind))


def test_a_subclass_is_not_taken_for_the_pool_it_derives_from():
    class Patched(memory_pool.MHATokenToKVPool):
        pass

    assert "Patched" in refusal(Patched.__new__(Patched))


def test_what_is_not_a_pool_at_all_is_refused():
    assert "object" in refusal(object())


def test_other_layouts_shapes_and_scales_are_refused():
    other_layout = mha_pool()
    other_layout.kv_cache_layout = "hnd"
    assert "hnd" in refusal(other_layout)
    assert "head_dim" in refusal(mha_pool(v_head_dim=16))
    with_scales = mha_pool()
    with_scales.k_scale_buffer = [torch.ones(1)]
    assert "scales" in refusal(with_scales)


def test_latents_with_scales_of_sparse_attention_or_spread_over_ranks_are_refused():
    with_scales = mla_pool()
    with_scales.kv_scale_buffer = [torch.ones(1)]
    assert "scales" in refusal(with_scales)
    assert "sparse" in refusal(mla_pool(use_dsa=True))
    spread = mla_pool()
    spread.layer_shard_enabled = True
    assert "spread over ranks" in refusal(spread)


def test_a_dtype_that_can_not_be_coded_is_refused():
    assert "float32" in refusal(mha_pool(torch.float32))
    assert "float32" in refusal(mla_pool(torch.float32))
