"""Holds a restore kernel to its reference on the device it will run on, before any page depends on it."""

from __future__ import annotations

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.spec import KVSpec, layer_groups
from sglang_kvcodec.kernels.base import KernelRestore
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.floats import to_bits, torch_dtype

_PAGES = 2
_SPARE_SLOTS = 3


def check_restore(kernel: KernelRestore, profile_name: str, spec: KVSpec, device: torch.device) -> None:
    """Restores made-up pages into memory of its own, for each size of layer group. Compiles the kernel by the way.

    Raises:
        ConfigurationError: another bit than the reference's anywhere.
    """
    transform = get_transform(profile_name, spec)
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(_PAGES * spec.page_tokens).flip(0) + 1
    for layers in sorted({group.layers for group in layer_groups(spec)}):
        values = torch.randn((_PAGES, layers, *_slot_shape(spec, spec.page_tokens)), generator=generator)
        values[0, 0, 0, 0, 0] = float("inf")
        packed = transform.pack(values.to(torch_dtype(spec.dtype)))
        expected = torch.zeros((layers, *_slot_shape(spec, len(slots) + _SPARE_SLOTS)), dtype=torch_dtype(spec.dtype))
        pool = expected.to(device, copy=True)
        to_bits(expected)[:, slots] = to_bits(transform.restore(layers, packed)).transpose(0, 1).flatten(1, 2)
        kernel.restore(packed, slots.to(device), list(pool))
        if not torch.equal(to_bits(pool.cpu()), to_bits(expected)):
            raise ConfigurationError(f"the kernel of profile {profile_name!r} restores wrong values on {device}")


def _slot_shape(spec: KVSpec, slots: int) -> tuple[int, int, int]:
    return slots, spec.kv_heads, spec.head_dim
