"""Holds what packs on a device to the reference there, before any page is published with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, layer_groups
from sglang_kvcodec.kernels.base import PagePack
from sglang_kvcodec.kernels.check import PAGES, SPARE_SLOTS, made_up_pages, slot_shape
from sglang_kvcodec.transform import PackedSide, PageTransform
from sglang_kvcodec.transform.floats import to_bits, torch_dtype
from sglang_kvcodec.transform.klt import KltTransform

MOST_OTHER_CODES = 0.01
"""Part of the codes that may lie on the other side of a tie."""
MOST_OTHER_GAINS = 0.05
"""Part of the tokens whose gain may, or one of them where they are few."""
MOST_NOISE = 1.02
"""Squared error of what is restored, over the reference's."""
_ROUNDING = 2.0**-20
"""Squared error of what is restored exactly but for the rounding to the pool's type, over the squared values."""


def check_pack(
    pack: PagePack,
    transform: PageTransform,
    spec: KVSpec,
    device: torch.device,
    calibration: Calibration | None = None,
    tier: str = "",
) -> None:
    """Packs made-up pages out of memory of its own, for each size of layer group and side. Compiles by the way.

    Args:
        pack: to check.
        transform: the reference for the same coding.
        spec: of the pages.
        device: of ``pack``.
        calibration: of the coding; None for one without, whose packed sides must be the reference's to the bit.
        tier: of it.

    Raises:
        ConfigurationError: packed sides that the reference would not make, up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(PAGES * spec.page_tokens).flip(0) + 1
    positions = [3 * spec.page_tokens, 0]
    for group in {group.layers: group for group in layer_groups(spec)}.values():
        for side in spec.sides:
            shape = (PAGES, group.layers, *slot_shape(spec, spec.page_tokens))
            if isinstance(transform, KltTransform):
                assert calibration is not None, "this transform is made from one"
                sides = made_up_pages(transform, calibration, tier, group, side, generator)
                values = transform.restore(group, side, sides, positions).cpu()
            else:
                values = torch.randn(shape, generator=generator).to(torch_dtype(spec.dtype))
                values[0, 0, 0, 0, 0], values[-1, -1, -1, -1, -1] = float("nan"), 300.0
            pool = torch.zeros((group.layers, *slot_shape(spec, len(slots) + SPARE_SLOTS)), dtype=values.dtype)
            to_bits(pool)[:, slots] = to_bits(values.transpose(0, 1)).flatten(1, 2)
            got = pack.pack(group, side, positions, slots.to(device), list(pool.to(device)))
            want = transform.pack(group, side, values, positions)
            if (
                got is None
                or want is None
                or not _is_packed_alike(transform, group, side, values, positions, got, want)
            ):
                raise ConfigurationError(f"pages are packed wrongly on {device}")


def _is_packed_alike(
    transform: PageTransform,
    group: LayerGroup,
    side: Side,
    values: torch.Tensor,
    positions: Sequence[int],
    got: Sequence[PackedSide],
    want: Sequence[PackedSide],
) -> bool:
    if len(got) != len(want):
        return False
    if not isinstance(transform, KltTransform):
        return all(_is_same(a, b) for a, b in zip(got, want, strict=True))
    return differences(transform, group, side, values, positions, got, want) == []


def differences(
    transform: KltTransform,
    group: LayerGroup,
    side: Side,
    values: torch.Tensor,
    positions: Sequence[int],
    got: Sequence[PackedSide],
    want: Sequence[PackedSide],
) -> list[str]:
    """What rounding does not explain of how two packed sides of the same values differ; empty if all is well.

    Args:
        transform: the reference.
        group: which layers.
        side: which tensor of them.
        values: what was packed.
        positions: of the pages' first tokens.
        got: packed sides to judge.
        want: the reference's.

    Raises:
        FormatError: packed sides that are none.
    """
    found = []
    codes, expected_codes = (transform.codes(group, side, pages).cpu() for pages in (got, want))
    steps, expected_steps = (transform.steps(group, side, pages).cpu() for pages in (got, want))
    has_other_gain = (steps != expected_steps).any(1)
    if int(has_other_gain.sum()) > max(1, MOST_OTHER_GAINS * has_other_gain.numel()):
        found.append(f"{int(has_other_gain.sum())} of {has_other_gain.numel()} tokens have another gain")
    apart = (codes - expected_codes).abs()[~has_other_gain]
    if apart.numel() and int(apart.max()) > 1:
        found.append(f"a code is {int(apart.max())} steps from the reference's")
    if int((apart != 0).sum()) > max(1, MOST_OTHER_CODES * apart.numel()):
        found.append(f"{int((apart != 0).sum())} of {apart.numel()} codes are others")
    noise, expected_noise = (
        (transform.restore(group, side, pages, positions).cpu().float() - values.cpu().float()).square().sum()
        for pages in (got, want)
    )
    if not float(noise) <= MOST_NOISE * float(expected_noise) + _ROUNDING * float(values.float().square().sum()):
        found.append(f"an error of {float(noise):.4g} where the reference's is {float(expected_noise):.4g}")
    return found


def _is_same(a: PackedSide, b: PackedSide) -> bool:
    if (a.canvas is None) != (b.canvas is None):
        return False
    if a.canvas is not None and b.canvas is not None and not torch.equal(a.canvas.cpu(), b.canvas.cpu()):
        return False
    return (a.stored, a.escapes, a.steps) == (b.stored, b.escapes, b.steps)
