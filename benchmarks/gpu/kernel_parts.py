"""What the device does beside the engines: ceilings, restore, digests."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu.real_kv import RealKV
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.video_parts import MODEL, Row
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups, picture_geometry
from sglang_kvcodec.kernels import PageRestores, check_restore, open_restore
from sglang_kvcodec.kernels.digest import plane_digests
from sglang_kvcodec.kernels.planes import planes_of
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform import PackedSide, get_transform
from sglang_kvcodec.transform.klt import KltTransform

SMALL = KVSpec(layers=3, kv_heads=2, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)


def spec_of(rig: Rig) -> KVSpec:
    return rig.pick(MODEL, SMALL)


def ceilings(rig: Rig) -> list[Row]:
    """What the device can at best: copies, and products of matrices in bf16."""
    size_bytes = rig.pick(2 << 30, 1 << 20)
    source = torch.empty(size_bytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    copy_s = rig.seconds(lambda: target.copy_(source))
    host = torch.empty(size_bytes // 4, dtype=torch.uint8, pin_memory=not rig.is_rehearsal)
    host_s = rig.seconds(lambda: target[: len(host)].copy_(host, non_blocking=True))
    side = rig.pick(8192, 128)
    matrix = torch.randn(side, side, device=rig.device, dtype=torch.bfloat16)
    product_s = rig.seconds(lambda: matrix @ matrix)
    return [
        {
            "copy_gb_per_s": 2 * size_bytes / copy_s / 1e9,
            "host_to_device_gb_per_s": len(host) / host_s / 1e9,
            "matmul_tflop_per_s": 2 * side**3 / product_s / 1e12,
        }
    ]


def restore_identity(rig: Rig, copy_gb_per_s: float | None) -> list[Row]:
    """The kernels of profiles without a calibration, canvases on the device already: bytes read and written."""
    rows = []
    spec = spec_of(rig)
    # Several times what the device's caches hold.
    pages, different = rig.pick((256, 32), (2, 2))
    group = layer_groups(spec)[0]
    for profile in ("exact", "high"):
        kernel = open_restore(profile, spec)
        if kernel is None:
            raise RuntimeError(f"profile {profile!r} has no kernel")
        check_restore(kernel, profile, spec, rig.device)
        packed = get_transform(profile, spec).pack(kv_like(spec, different, group.layers, seed=0))
        canvases = torch.stack([packed[index % different].canvas for index in range(pages)])
        planes = planes_of(canvases.to(rig.device))
        packed = [_without_canvas(packed[index % different]) for index in range(pages)]
        slots = torch.randperm(pages * spec.page_tokens, generator=torch.Generator().manual_seed(0)).to(rig.device)
        buffers = [
            torch.zeros((len(slots), spec.kv_heads, spec.head_dim), dtype=torch.bfloat16, device=rig.device)
            for _ in range(group.layers)
        ]
        work = functools.partial(kernel.restore, packed, slots, buffers, planes)
        seconds, device_s = rig.seconds(work), rig.device_seconds(work)
        kernels_s = device_s - _upload_seconds(rig, sum(len(side.stored) + len(side.escapes) for side in packed))
        moved = canvases.numel() + sum(len(side.stored) for side in packed) + sum(b.nbytes for b in buffers)
        groups = len(layer_groups(spec)) * len(spec.sides)
        rows.append(
            {
                "profile": profile,
                "tokens": len(slots),
                "all_layers_ms": seconds * groups * 1e3,
                "device_ms": device_s * groups * 1e3,
                "kernels_ms": kernels_s * groups * 1e3,
                "kernels_gb_per_s": moved / kernels_s / 1e9,
                "share_of_copy_bandwidth": moved / kernels_s / 1e9 / copy_gb_per_s if copy_gb_per_s else None,
                "includes": "all_layers_ms: launch and the host's preparation; device_ms: escapes and stored bytes "
                "sent from the host; kernels_ms and the share: neither",
            }
        )
    return rows


def _without_canvas(side: PackedSide) -> PackedSide:
    return PackedSide(None, side.stored, side.escapes, side.steps)


def _upload_seconds(rig: Rig, size_bytes: int) -> float:
    """What a copy of so many bytes to the device takes of its time."""
    if not size_bytes:
        return 0.0
    pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=not rig.is_rehearsal)
    return rig.device_seconds(lambda: pinned.to(rig.device, non_blocking=True))


def restore_klt(rig: Rig, copy_gb_per_s: float | None, matmul_tflop_per_s: float | None) -> list[Row]:
    """Calibrated pages of real KV, with a basis per layer and one over three, for all layers of the model."""
    real = RealKV(rig.pick(MODEL.kv_heads, 1))
    return [row for blocks in (1, 3) for row in _klt_rows(rig, real, blocks, copy_gb_per_s, matmul_tflop_per_s)]


def _klt_rows(
    rig: Rig, real: RealKV, layers_per_basis: int, copy_gb_per_s: float | None, matmul_tflop_per_s: float | None
) -> list[Row]:
    """By the reference on the device, and by the kernel; K of one layer group, times sides and groups of a model."""
    spec, count = real.spec, rig.pick(64, 2)
    tokens = count * spec.page_tokens
    transforms = real.transforms("high", layers_per_basis, rig.device)
    digest = real.calibrations[layers_per_basis].digest
    transform = transforms.get("high", digest)
    group = layer_groups(spec)[0]
    turns = [index % len(real.values) for index in range(count)]
    positions = [real.positions[turn] for turn in turns]
    values = torch.stack([real.values[turn][Side.KEY] for turn in turns]).to(rig.device)
    packed = transform.pack(group, Side.KEY, values, positions)
    if packed is None or not isinstance(transform, KltTransform):
        raise RuntimeError("the calibration can't code the values")
    groups = len(MODEL.sides) * MODEL.layers / spec.layers
    width = layers_per_basis * spec.channels
    flop = 2 * tokens * transform.components(group, Side.KEY) * width * groups
    # Canvas bytes read, 16-bit values written: what no kernel can do without.
    moved = (sum(side.canvas.numel() for side in packed if side.canvas is not None) + 2 * values.numel()) * groups
    bounds_s = {
        "tensor cores": flop / matmul_tflop_per_s / 1e12 if matmul_tflop_per_s else 0.0,
        "memory": moved / copy_gb_per_s / 1e9 if copy_gb_per_s else 0.0,
    }
    bound = max(bounds_s, key=lambda name: bounds_s[name])

    def row(what: str, work: Callable[[], object]) -> Row:
        seconds = rig.seconds(work, rig.pick(5, 1)) * groups
        device_s = rig.device_seconds(work, rig.pick(5, 1)) * groups
        return {
            "by": what,
            "layers_per_basis": layers_per_basis,
            "tokens": tokens,
            "components_kept": transform.components(group, Side.KEY) / (spec.layers * spec.channels),
            "all_layers_ms": seconds * 1e3,
            "device_ms": device_s * 1e3,
            "tflop_per_s": flop / device_s / 1e12,
            "bound": bound,
            "bound_ms": bounds_s[bound] * 1e3,
            "share_of_bound": bounds_s[bound] / device_s,
        }

    on_host = [_without_canvas(side) for side in packed]
    canvases = torch.stack([side.canvas for side in packed if side.canvas is not None]).to(rig.device)
    planes = planes_of(canvases)
    rows = [row("transform, torch", lambda: transform.restore(group, Side.KEY, packed, positions))]
    kernel = PageRestores(transforms, rig.device).get("high", digest)
    slots = torch.arange(tokens, device=rig.device)
    buffers = list(torch.zeros((group.layers, tokens, *values.shape[3:]), dtype=values.dtype, device=rig.device))
    work = functools.partial(kernel.restore, group, Side.KEY, on_host, positions, slots, buffers, planes)
    return [*rows, row("kernel", work)]


def digest(rig: Rig, copy_gb_per_s: float | None) -> list[Row]:
    """The digests of pictures that lie on the device: bytes read."""
    pages = rig.pick(256, 2)
    geometry = picture_geometry(spec_of(rig))
    canvases = torch.randint(0, 256, (pages, *geometry.canvas_shape), dtype=torch.uint8, device=rig.device)
    planes = planes_of(canvases)
    expected = [plane_digest(canvas) for canvas in canvases[:2].cpu().numpy()]
    found = plane_digests(planes, geometry.width, geometry.height)[:2].cpu().numpy().view(np.uint64).tolist()
    if found != expected:
        raise RuntimeError("the digest kernel does not give the digest of the pictures")
    seconds = rig.seconds(lambda: plane_digests(planes, geometry.width, geometry.height))
    gb_per_s = canvases.numel() / seconds / 1e9
    return [
        {
            "pictures": pages,
            "gb_per_s": gb_per_s,
            "share_of_copy_bandwidth": gb_per_s / copy_gb_per_s if copy_gb_per_s else None,
        }
    ]
