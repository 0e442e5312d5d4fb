"""The layers of a pool that a kernel writes to, checked: a kernel writes where it is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_kvcodec.format.spec import KVSpec, picture_geometry

_INTEGERS = {1: torch.uint8, 2: torch.int16}
"""Kernels write bits, so that a pool of 8-bit floats may be one of bytes."""


def writable_layers(spec: KVSpec, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The buffers as integers ``(slots, channels)``, the same memory.

    Raises:
        ValueError: none or too many of them, or any of another shape, element size, device or layout.
    """
    if not 1 <= len(buffers) <= picture_geometry(spec).layers_per_picture:
        raise ValueError(f"{len(buffers)} layers are no layer group")
    first = buffers[0]
    for buffer in buffers:
        if buffer.dim() != 3 or tuple(buffer.shape[1:]) != (spec.kv_heads, spec.head_dim):
            raise ValueError(f"expected a layer (slots, {spec.kv_heads}, {spec.head_dim}), got {tuple(buffer.shape)}")
        if buffer.element_size() != spec.dtype.item_bytes:
            raise ValueError(f"expected {spec.dtype.torch_name} layers, got {buffer.dtype}")
        if (buffer.device, len(buffer)) != (first.device, len(first)):
            raise ValueError("layers of one group on two devices, or with different numbers of slots")
        is_packed = buffer.stride(2) == 1 and buffer.stride(1) == spec.head_dim
        if not is_packed or buffer.stride(0) < spec.channels:
            raise ValueError(f"expected a slot's values side by side, got strides {buffer.stride()}")
    return [buffer.view(_INTEGERS[spec.dtype.item_bytes]).view(len(buffer), spec.channels) for buffer in buffers]


def one_stride(layers: Sequence[torch.Tensor], expected: int) -> int:
    """From a slot to the next, in values, of all of ``expected`` layers that :func:`writable_layers` gave.

    Raises:
        ValueError: another number of layers, or another stride in one of them.
    """
    strides = {layer.stride(0) for layer in layers}
    if len(layers) != expected or len(strides) != 1:
        raise ValueError(f"expected {expected} layers with one stride")
    return strides.pop()


def check_slots(slots: torch.Tensor, pages: int, spec: KVSpec, layer: torch.Tensor) -> None:
    """Refuses slots that are not those of ``pages`` pages, without waiting for the device.

    What the slots are is the kernels' to see: they leave alone what would lie outside the layer.

    Raises:
        ValueError: no pages, another shape, type or device, or not contiguous.
    """
    if slots.dtype != torch.int64 or tuple(slots.shape) != (pages * spec.page_tokens,) or not slots.is_contiguous():
        raise ValueError(f"expected int64 slots of {pages} pages, got {slots.dtype} {tuple(slots.shape)}")
    if slots.device != layer.device:
        raise ValueError(f"slots on {slots.device}, the pool on {layer.device}")
    if not pages:
        raise ValueError("no pages")


def check_readable_slots(slots: torch.Tensor, pages: int, spec: KVSpec, layer: torch.Tensor) -> None:
    """As :func:`check_slots`, and that all slots are in the pool, for whoever may wait for the device: packs do anyway.

    Raises:
        ValueError: they are not.
    """
    check_slots(slots, pages, spec, layer)
    if slots.numel() and not bool(((slots >= 0) & (slots < len(layer))).all()):
        raise ValueError("a slot that is not in the pool")
