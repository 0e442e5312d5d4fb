"""Gains of single tokens: what a token's steps are multiplied with, since errors of some cost far more than of others.

Attention parks on few tokens: the first ones (Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
ICLR 2024), delimiters, and whatever else a model has learned to use so. An error there moves the output a hundred times
as much as elsewhere. Such tokens look different in their components, so a writer predicts from these how finely to
code (``GainModel``), and says what it did: readers never compute a gain.

A gain is ``2**((level - 12) / 2)``, with a level of 0 to 15 for each token and block of layers. The bytes hold for each
block in order a row of levels, two to a byte, the earlier token in the lower half, the last byte filled up with zero.
Where all levels are 12 there are no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.calibration import GAIN_LOG_OFFSET, GainModel, Tier
from sglang_kvcodec.transform.base import PackedSide

UNIT_LEVEL = 12
"""The level of a gain of one."""
COARSEST_LEVEL = 14
"""A writer never goes beyond twice the step: a token that nobody asked for yet may be asked for later."""
_LEVELS = 16
_GAINS = tuple(float(np.float32(2.0 ** ((level - UNIT_LEVEL) / 2))) for level in range(_LEVELS))


def gains_of_levels(levels: torch.Tensor) -> torch.Tensor:
    """fp32 gains of integer levels, any shape."""
    return torch.tensor(_GAINS, dtype=torch.float32, device=levels.device)[levels.to(torch.int64)]


def level_of_gain(gain: float) -> int:
    """The level whose gain is closest to ``gain``, in the logarithm."""
    return min(max(round(2 * float(np.log2(gain))) + UNIT_LEVEL, 0), _LEVELS - 1)


def predicted_levels(components: torch.Tensor, model: GainModel) -> torch.Tensor:
    """The levels that a model predicts.

    Args:
        components: fp32 ``(..., components)``, at least as many as the model looks at.
        model: of the block.

    Returns:
        uint8 ``(...)``.
    """
    device = components.device
    scaled = components[..., : len(model.scales)] / torch.from_numpy(model.scales).to(device)
    log2_gain = (
        model.bias
        + scaled @ torch.from_numpy(model.linear).to(device)
        + (scaled.abs() + GAIN_LOG_OFFSET).log() @ torch.from_numpy(model.logarithmic).to(device)
    )
    # A sum that is no number says nothing: its token is coded like any other.
    levels = torch.round(2 * log2_gain).nan_to_num(0.0) + UNIT_LEVEL
    return levels.clamp(0, COARSEST_LEVEL).to(torch.uint8)


def written_levels(
    components: Sequence[torch.Tensor], models: Sequence[GainModel], tier: Tier, first_positions: Sequence[int]
) -> torch.Tensor:
    """The levels that a writer of a tier gives tokens: the first ones what the tier says, all others what is predicted.

    Args:
        components: of each block fp32 ``(pages, page_tokens, components)``.
        models: of each block.
        tier: of the pages.
        first_positions: of each page's first token.

    Returns:
        uint8 ``(pages, blocks, page_tokens)``, on the components' device.
    """
    predicted = [predicted_levels(part, model) for part, model in zip(components, models, strict=True)]
    levels = torch.stack(predicted, dim=1)
    for page, first in enumerate(first_positions):
        for token in range(levels.shape[-1]):
            gain = tier.gain(first + token)
            if gain is None:
                break  # Later ones have none either.
            levels[page, :, token] = level_of_gain(gain)
    return levels


def pack_levels(levels: torch.Tensor) -> bytes:
    """The bytes of the levels of one page, uint8 ``(blocks, page_tokens)``."""
    if bool((levels == UNIT_LEVEL).all()):
        return b""
    rows = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2)).cpu().numpy()
    packed: bytes = (rows[:, 0::2] | rows[:, 1::2] << 4).astype(np.uint8).tobytes()
    return packed


def unpack_levels(rows: Sequence[bytes], blocks: int, page_tokens: int) -> torch.Tensor:
    """The inverse of :func:`pack_levels` for many pages.

    Returns:
        uint8 ``(pages, blocks, page_tokens)``, on the CPU.

    Raises:
        FormatError: another number of bytes, or a filling that is not zero.
    """
    row_bytes = -(-page_tokens // 2)
    levels = np.full((len(rows), blocks, 2 * row_bytes), UNIT_LEVEL, np.uint8)
    for index, data in enumerate(rows):
        if not data:
            continue
        if len(data) != blocks * row_bytes:
            raise FormatError(f"{len(data)} bytes of gains for {blocks} blocks of {page_tokens} tokens")
        packed = np.frombuffer(data, np.uint8).reshape(blocks, row_bytes)
        levels[index, :, 0::2], levels[index, :, 1::2] = packed & 15, packed >> 4
        if page_tokens % 2 and levels[index, :, -1].any():
            raise FormatError("gains of a token that is none")
    return torch.from_numpy(levels[..., :page_tokens].copy())


def token_steps(packed: Sequence[PackedSide], blocks: int, page_tokens: int, low_bytes: int) -> torch.Tensor:
    """What the whole numbers of packed sides are multiplied with.

    Args:
        packed: the sides of one layer group.
        blocks: of the group.
        page_tokens: of a page.
        low_bytes: of each page's low bits, which lie behind the gains.

    Returns:
        fp32 ``(pages, blocks, page_tokens)``, on the CPU.

    Raises:
        FormatError: steps or gains that are none, or too many or too few.
    """
    for side in packed:
        if len(side.steps) != blocks or not all(math.isfinite(step) and step > 0 for step in side.steps):
            raise FormatError("quantiser steps that are none, or too many or too few")
    levels = unpack_levels(
        [side.stored[: max(0, len(side.stored) - low_bytes)] for side in packed], blocks, page_tokens
    )
    steps = torch.tensor([side.steps for side in packed], dtype=torch.float32)
    return steps[..., None] * gains_of_levels(levels)


def stored_low_bits(packed: Sequence[PackedSide], low_bytes: int) -> list[bytes]:
    """The stored bytes of packed sides without the gains in front; too few of them where there are too few."""
    return [side.stored[max(0, len(side.stored) - low_bytes) :] for side in packed]
