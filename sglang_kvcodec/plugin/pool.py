"""SGLang's KV pools: the only place that knows their variants. What is not known is refused, never guessed."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

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
    if type(kv_cache) is not MHATokenToKVPool:
        raise UnsupportedError(f"kvcodec can't code a {type(kv_cache).__name__}, only a plain MHA/GQA KV cache")
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
        dtype=KVDtype.from_torch_name(str(kv_cache.dtype).removeprefix("torch.")),
    )

    def buffers() -> Buffers:
        return {Side.KEY: kv_cache.k_buffer, Side.VALUE: kv_cache.v_buffer}

    return PagedKVPool(spec, buffers, torch.device(kv_cache.device))
