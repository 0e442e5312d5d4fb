"""The write side on the device: pages packed where they lie in a pool, into pinned host memory and on the device."""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu.real_kv import RealKV
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.video_parts import MODEL, Row
from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.kernels.page_packs import PagePacks
from sglang_kvcodec.transform import PageTransforms

CODINGS: tuple[tuple[str, int | None], ...] = (("exact", None), ("high", None), ("high", 1), ("high", 3))
"""Profile, and layers of a basis; None without a calibration."""


def pack(rig: Rig, copy_gb_per_s: float | None) -> list[Row]:
    """K of real pages, one layer group; times sides and groups of a model: milliseconds for all layers."""
    real = RealKV(rig.pick(MODEL.kv_heads, 1))
    return [
        _row(rig, real, profile, layers, use_kernels, copy_gb_per_s)
        for profile, layers in CODINGS
        for use_kernels in (False, True)
    ]


def _row(
    rig: Rig, real: RealKV, profile: str, layers_per_basis: int | None, use_kernels: bool, copy_gb_per_s: float | None
) -> Row:
    spec, pages = real.spec, rig.pick(64, 2)
    group = layer_groups(spec)[0]
    if layers_per_basis is None:
        transforms, digest = PageTransforms(spec, profile, [], rig.device), b""
    else:
        transforms = real.transforms(profile, layers_per_basis, rig.device)
        digest = real.calibrations[layers_per_basis].digest
    turns = [index % len(real.values) for index in range(pages)]
    values = torch.stack([real.values[turn][Side.KEY] for turn in turns])
    layers = values.transpose(0, 1).flatten(1, 2).contiguous().to(rig.device)
    slots = torch.arange(pages * spec.page_tokens, device=rig.device)
    packs = PagePacks(transforms, rig.device, use_kernels=use_kernels).get(profile, digest)
    canvases = torch.empty((pages, *packs.canvas_shape), dtype=torch.uint8, pin_memory=rig.device.type == "cuda")
    positions = [real.positions[turn] for turn in turns]
    work = functools.partial(packs.pack, group, Side.KEY, positions, slots, list(layers), canvases)
    packed = work()
    if packed is None:
        raise RuntimeError(f"{profile!r} can't code the values")
    groups = len(MODEL.sides) * MODEL.layers / spec.layers
    seconds = rig.seconds(work, rig.pick(5, 1))
    moved = layers.nbytes + canvases.nbytes + sum(len(page.stored) + len(page.escapes) for page in packed)
    return {
        "profile": profile,
        "by": "kernel" if use_kernels else "transform, torch",
        "layers_per_basis": layers_per_basis,
        "tokens": len(slots),
        "all_layers_ms": seconds * groups * 1e3,
        "tokens_per_s_at_120_ki_values": values.numel() / seconds / (120 << 10),
        "gb_per_s": moved / seconds / 1e9,
        "share_of_copy_bandwidth": moved / seconds / 1e9 / copy_gb_per_s if copy_gb_per_s else None,
        "includes": "canvases into pinned host memory, side bytes made on the host",
    }
