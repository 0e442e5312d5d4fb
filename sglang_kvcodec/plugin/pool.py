"""SGLang's KV pools: the only place that knows their variants. What is not known is refused, never guessed."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVCache, MHATokenToKVPool, MLATokenToKVPool

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.flow.kv_pool import Buffers, PagedKVPool
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side


def wrap_pool(kv_cache: Any, page_tokens: int) -> PagedKVPool:
    """The pool as the flow sees it.

    Args:
        kv_cache: SGLang's device pool.
        page_tokens: SGLang's page size.

    Raises:
        UnsupportedError: a pool that can't be coded.
    """
    # A subclass keeps its KV in another way.
    if type(kv_cache) is MHATokenToKVPool:
        return _wrap_plain(kv_cache, page_tokens)
    if type(kv_cache) is MLATokenToKVPool:
        return _wrap_latent(kv_cache, page_tokens)
    raise UnsupportedError(f"kvcodec can't code a {type(kv_cache).__name__}, only a plain MHA, GQA or MLA KV cache")


def _wrap_plain(kv_cache: MHATokenToKVPool, page_tokens: int) -> PagedKVPool:
    if kv_cache.kv_cache_layout != "nhd":
        raise UnsupportedError(f"kvcodec can't code a KV cache in {kv_cache.kv_cache_layout} layout, only in nhd")
    if kv_cache.head_dim != kv_cache.v_head_dim:
        raise UnsupportedError("kvcodec can't code a KV cache whose keys and values differ in head_dim")
    if kv_cache.k_scale_buffer is not None:
        raise UnsupportedError("kvcodec can't code a KV cache with scales in a buffer of their own")
    spec = KVSpec(
        layers=kv_cache.layer_num,
        kv_heads=kv_cache.head_num,
        head_dim=kv_cache.head_dim,
        page_tokens=page_tokens,
        dtype=_dtype(kv_cache),
    )

    def buffers() -> Buffers:
        return {Side.KEY: kv_cache.k_buffer, Side.VALUE: kv_cache.v_buffer}

    return PagedKVPool(spec, buffers, _device(kv_cache))


def _wrap_latent(kv_cache: MLATokenToKVPool, page_tokens: int) -> PagedKVPool:
    """A latent of each token: ``kv_lora_rank`` compressed values, then ``qk_rope_head_dim`` of a rotated key.

    Every tensor-parallel rank holds the same latents; each stores its own, in the namespace of its rank.
    """
    if kv_cache.use_dsa or kv_cache.kv_cache_dim != kv_cache.kv_lora_rank + kv_cache.qk_rope_head_dim:
        raise UnsupportedError("kvcodec can't code the KV cache of sparse attention over latents")
    if kv_cache.kv_scale_buffer is not None:
        raise UnsupportedError("kvcodec can't code a KV cache with scales in a buffer of their own")
    if kv_cache.layer_shard_enabled:
        raise UnsupportedError("kvcodec can't code a KV cache whose layers are spread over ranks")
    spec = KVSpec(
        layers=kv_cache.layer_num,
        kv_heads=1,
        head_dim=kv_cache.kv_cache_dim,
        page_tokens=page_tokens,
        dtype=_dtype(kv_cache),
        sides=(Side.LATENT,),
    )

    def buffers() -> Buffers:
        return {Side.LATENT: kv_cache.kv_buffer}

    return PagedKVPool(spec, buffers, _device(kv_cache))


def _device(kv_cache: KVCache) -> torch.device:
    """With its number: SGLang's says ``"cuda"``, which on another thread than this one may be another GPU."""
    device = torch.device(kv_cache.device)
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dtype(kv_cache: KVCache) -> KVDtype:
    return KVDtype.from_torch_name(str(kv_cache.dtype).removeprefix("torch."))
