"""KV that is made up but looks like KV: channels with scales and means of their own, tokens that drift, outliers."""

from __future__ import annotations

import torch

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side


def kv_like(spec: KVSpec, pages: int, layers: int, seed: int) -> torch.Tensor:
    """Values ``(pages, layers, page_tokens, kv_heads, head_dim)`` in the spec's dtype, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pages, layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
    noise = torch.randn(shape, generator=generator)
    drift = torch.randn((*shape[:2], 1, *shape[3:]), generator=generator)
    scale = torch.rand((layers, 1, spec.kv_heads, spec.head_dim), generator=generator) * 2 + 0.05
    outliers = (torch.rand(shape, generator=generator) < 1e-4) * 50.0
    values = scale * (noise + 2 * drift) + outliers
    return values.to(getattr(torch, spec.dtype.torch_name))


def random_bits(dtype: KVDtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values of any bit pattern: NaN with payloads, infinities, negative zero and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.item_bytes), dtype=torch.uint8, generator=generator)
    return data.view(getattr(torch, dtype.torch_name))


def page_values(spec: KVSpec, seed: int) -> dict[Side, torch.Tensor]:
    """One page: for each side ``(layers, page_tokens, kv_heads, head_dim)``."""
    return {side: kv_like(spec, 1, spec.layers, seed + index)[0] for index, side in enumerate(spec.sides)}
