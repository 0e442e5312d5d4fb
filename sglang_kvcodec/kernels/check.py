"""Holds a restore kernel to its reference on the device it will run on, before any page depends on it."""

from __future__ import annotations

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, layer_groups
from sglang_kvcodec.kernels.base import KernelRestore, PageRestore
from sglang_kvcodec.transform import PackedSide, get_transform
from sglang_kvcodec.transform.component_escapes import pack_component_escapes
from sglang_kvcodec.transform.components import component_layout, components_to_canvas
from sglang_kvcodec.transform.floats import to_bits, to_bytes, torch_dtype
from sglang_kvcodec.transform.klt import KltTransform
from sglang_kvcodec.transform.layout import CANVAS_FILL
from sglang_kvcodec.transform.low_bits import low_bits_bytes
from sglang_kvcodec.transform.token_gains import UNIT_LEVEL, pack_levels

PAGES = 2
SPARE_SLOTS = 3
_SUM_ERROR = 2.0**-14
"""Of the largest value: sums of some thousand products, each good to 2**-24."""


def check_restore(kernel: KernelRestore, profile_name: str, spec: KVSpec, device: torch.device) -> None:
    """Restores made-up pages into memory of its own, for each size of layer group. Compiles the kernel by the way.

    Raises:
        ConfigurationError: another bit than the reference's anywhere.
    """
    transform = get_transform(profile_name, spec)
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(PAGES * spec.page_tokens).flip(0) + 1
    for layers in sorted({group.layers for group in layer_groups(spec)}):
        values = torch.randn((PAGES, layers, *slot_shape(spec, spec.page_tokens)), generator=generator)
        values[0, 0, 0, 0, 0] = float("inf")
        packed = transform.pack(values.to(torch_dtype(spec.dtype)))
        expected = torch.zeros((layers, *slot_shape(spec, len(slots) + SPARE_SLOTS)), dtype=torch_dtype(spec.dtype))
        pool = expected.to(device, copy=True)
        to_bits(expected)[:, slots] = to_bits(transform.restore(layers, packed)).transpose(0, 1).flatten(1, 2)
        kernel.restore(packed, slots.to(device), list(pool))
        if not torch.equal(to_bits(pool.cpu()), to_bits(expected)):
            raise ConfigurationError(f"the kernel of profile {profile_name!r} restores wrong values on {device}")


def check_digest(canvas_shape: tuple[int, int], device: torch.device) -> None:
    """Computes digests of made-up pictures of one size on the device, and has one wrong bit found. Compiles by the way.

    Args:
        canvas_shape: of the pictures.
        device: of the pool.

    Raises:
        ConfigurationError: a sound picture does not pass, or another one does.
    """
    from sglang_kvcodec.kernels.digest import pictures_differ
    from sglang_kvcodec.kernels.planes import planes_of

    rows, width = canvas_shape
    canvases = torch.randint(0, 256, (3, rows, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    digests = [plane_digest(canvas) for canvas in canvases.numpy()]
    canvases[1, -1, -1] ^= 1
    found = pictures_differ(planes_of(canvases.to(device)), width, rows * 2 // 3, digests)
    if found.tolist() != [False, True, False]:
        raise ConfigurationError(f"the digest kernel does not give the digests of pictures on {device}")


def check_calibrated(
    kernel: PageRestore, transform: KltTransform, calibration: Calibration, tier: str, device: torch.device
) -> None:
    """Restores made-up codes, escapes among them, for each size of layer group and side. Compiles by the way.

    Values may differ from the reference's by the rounding of fp32 sums, ``_SUM_ERROR`` of the page's largest value, and
    by one unit in the last place of the pool's type where that lies across a tie.

    Args:
        kernel: to check.
        transform: the reference for the same tier of the same calibration.
        calibration: of both.
        tier: of both.
        device: the kernel's.

    Raises:
        ConfigurationError: another value than the reference's, or one written beside the slots.
    """
    spec = transform.spec
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(PAGES * spec.page_tokens).flip(0) + 1
    positions = [3 * spec.page_tokens, 0]
    dtype = torch_dtype(spec.dtype)
    for group in {group.layers: group for group in layer_groups(spec)}.values():
        for side in spec.sides:
            packed = made_up_pages(transform, calibration, tier, group, side, generator)
            expected = torch.zeros((group.layers, *slot_shape(spec, len(slots) + SPARE_SLOTS)), dtype=dtype)
            pool = expected.to(device, copy=True)
            values = transform.restore(group, side, packed, positions).cpu()
            to_bits(expected)[:, slots] = to_bits(values).transpose(0, 1).flatten(1, 2)
            kernel.restore(group, side, packed, positions, slots.to(device), list(pool))
            got, want = pool.cpu().to(torch.float32), expected.to(torch.float32)
            bound = _SUM_ERROR * want.abs().max() + torch.finfo(dtype).eps * want.abs()
            bound[:, slots] += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            is_beside = torch.ones(expected.shape[1], dtype=torch.bool)
            is_beside[slots] = False
            is_good = bool(((got - want).abs() <= bound).all()) and not bool(to_bits(pool.cpu())[:, is_beside].any())
            if not is_good:
                raise ConfigurationError(f"the kernel of tier {tier!r} restores wrong values on {device}")


def made_up_pages(
    transform: KltTransform,
    calibration: Calibration,
    tier: str,
    group: LayerGroup,
    side: Side,
    generator: torch.Generator,
) -> list[PackedSide]:
    """Random small codes on the canvas, random low bits and gains, and an escape in each page."""
    spec = transform.spec
    blocks = [
        index
        for index, (first, _) in enumerate(calibration.blocks())
        if group.first_layer <= first < group.first_layer + group.layers
    ]
    chosen = calibration.tiers[tier]
    counts = torch.cat([torch.from_numpy(chosen.low_bits[side][index]) for index in blocks]).to(torch.int32)
    stored_bytes = low_bits_bytes(counts, spec.page_tokens)
    components = transform.components(group, side)
    codes = torch.randint(CANVAS_FILL - 3, CANVAS_FILL + 4, (PAGES, spec.page_tokens, components), generator=generator)
    layout = component_layout(transform.geometry)
    canvases = components_to_canvas(codes.to(torch.uint8), transform.geometry, layout)
    # Whole bytes of low bits, the last of a row cut to the tokens it has.
    stored = torch.randint(0, 256, (PAGES, stored_bytes), generator=generator).to(torch.uint8)
    stored.view(PAGES, -1, -(-spec.page_tokens // 8))[..., -1] &= (1 << ((spec.page_tokens - 1) % 8 + 1)) - 1
    steps = tuple(chosen.steps[side][index] for index in blocks)
    pages = []
    for canvas, row in zip(canvases, stored, strict=True):
        levels = torch.randint(UNIT_LEVEL - 4, UNIT_LEVEL + 2, (len(blocks), spec.page_tokens), generator=generator)
        escaped = torch.zeros((spec.page_tokens, components), dtype=torch.bool)
        escaped[-1, components // 2] = True
        escapes = pack_component_escapes(escaped.to(torch.int32) * 300, escaped)
        pages.append(PackedSide(canvas, pack_levels(levels.to(torch.uint8)) + to_bytes(row), escapes, steps))
    return pages


def slot_shape(spec: KVSpec, slots: int) -> tuple[int, int, int]:
    """Shape of a pool's layer, or of a page's."""
    return slots, spec.kv_heads, spec.head_dim
