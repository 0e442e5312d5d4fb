"""Rotary position embedding, undone and redone: stage ``rope/1``, the reference.

A rotation is a table of cos and sin, one row per token, and six fp32 operations per pair of dimensions. Undoing one is
the same arithmetic with another table, so one kernel does both. Tables are made on the CPU, in double precision, for
every device: an angle in single precision is off by up to 0.03 radians at position 2**20, and a GPU's sine is not a
CPU's. That costs less than the rotation itself: a page's table has two values per token and pair, its K has four bytes
times heads times layers as many.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from sglang_kvcodec.format.rope import RopeSpec

_CACHED_TOKENS = 512
"""Largest table that is kept."""
_CACHED_TABLES = 64
"""A page has as many rotations as layer groups, all with the same table. At most 16 MiB with 128 dimensions."""

_Table = tuple[torch.Tensor, torch.Tensor]


def rotate(values: torch.Tensor, positions: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Rotates each head by the position of its token, as the model does.

    Args:
        values: fp32 ``(..., tokens, kv_heads, head_dim)``, on any device.
        positions: int64 ``(tokens,)``, or ``(..., tokens)`` that broadcasts to ``values``; best on the CPU, where it is
            needed.
        rope: the rotation.

    Returns:
        A new tensor like ``values``; what lies behind the first ``rotary_dim`` dimensions of a head is unchanged.

    Raises:
        ValueError: another shape or type, or a negative position; the caller's mistake.
    """
    return _turn(values, positions, rope, inverse=False)


def unrotate(values: torch.Tensor, positions: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """The inverse of :func:`rotate`, to the rounding of fp32; ``rope.scale`` is divided out."""
    return _turn(values, positions, rope, inverse=True)


def rotation_table(
    first_position: int, tokens: int, rope: RopeSpec, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of consecutive tokens, for a kernel that turns pairs ``(a, b)`` of one page.

    A pair becomes ``(a * cos - b * sin, b * cos + a * sin)``, each product, sum and difference rounded to fp32.

    Args:
        first_position: position of the first token.
        tokens: how many.
        rope: the rotation.
        inverse: the table of the inverse rotation.

    Returns:
        cos and sin with the scale in them, fp32 ``(tokens, rotary_dim / 2)`` each, on the CPU, the caller's own. Not
        inverse, they are rows of SGLang's ``cos_sin_cache``.

    Raises:
        ValueError: a negative position or number of tokens.
    """
    if first_position < 0 or tokens < 0:
        raise ValueError(f"there are no {tokens} tokens from position {first_position} on")
    positions = torch.arange(first_position, first_position + tokens, dtype=torch.int64)
    cos, sin = _table(positions, rope, inverse)
    return cos.clone(), sin.clone()


def rotation_tables(
    first_positions: Sequence[int], tokens: int, rope: RopeSpec, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of many pages, one behind the other: fp32 ``(pages * tokens, rotary_dim / 2)`` each.

    Otherwise as :func:`rotation_table`.
    """
    if tokens < 0 or any(first < 0 for first in first_positions):
        raise ValueError(f"there are no {tokens} tokens from position {min(first_positions, default=0)} on")
    starts = torch.tensor(list(first_positions), dtype=torch.int64)
    return _make_table((starts[:, None] + torch.arange(tokens)).flatten(), rope, inverse)


def _turn(values: torch.Tensor, positions: torch.Tensor, rope: RopeSpec, *, inverse: bool) -> torch.Tensor:
    if values.dtype != torch.float32 or values.dim() < 3 or values.shape[-1] != rope.head_dim:
        raise ValueError(f"expected fp32 (..., tokens, kv_heads, {rope.head_dim}), got {values.dtype} {values.shape}")
    tokens = values.shape[:-2]
    fits = zip(reversed(positions.shape[:-1]), reversed(tokens[:-1]), strict=False)
    if (
        positions.dtype != torch.int64
        or not 1 <= positions.dim() <= len(tokens)
        or positions.shape[-1] != tokens[-1]
        or not all(size in (1, wanted) for size, wanted in fits)
    ):
        raise ValueError(f"expected int64 positions of {tuple(tokens)}, got {positions.dtype} {positions.shape}")
    positions = positions.cpu()
    if positions.numel() and int(positions.min()) < 0:
        raise ValueError("a token at a negative position")
    cos, sin = (half.to(values.device).unsqueeze(-2) for half in _table(positions, rope, inverse))
    rotated, rest = values[..., : rope.rotary_dim], values[..., rope.rotary_dim :]
    if rope.is_interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    pairs = torch.stack(turned, dim=-1).flatten(-2) if rope.is_interleaved else torch.cat(turned, dim=-1)
    return torch.cat((pairs, rest), dim=-1)


def _table(positions: torch.Tensor, rope: RopeSpec, inverse: bool) -> _Table:
    """fp32 ``(*positions.shape, rotary_dim / 2)`` each; shared, so never written to."""
    if positions.numel() > _CACHED_TOKENS:
        return _make_table(positions, rope, inverse)
    key = positions.contiguous().numpy().tobytes()
    cos, sin = _kept_table(key, rope, inverse)
    shape = (*positions.shape, rope.rotary_dim // 2)
    return cos.view(shape), sin.view(shape)


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _kept_table(positions: bytes, rope: RopeSpec, inverse: bool) -> _Table:
    if not positions:
        return _make_table(torch.empty(0, dtype=torch.int64), rope, inverse)
    return _make_table(torch.frombuffer(bytearray(positions), dtype=torch.int64), rope, inverse)


def _make_table(positions: torch.Tensor, rope: RopeSpec, inverse: bool) -> _Table:
    frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float64)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    cos, sin = torch.cos(angles), torch.sin(angles)
    if inverse:
        cos, sin = cos / rope.scale, -sin / rope.scale
    else:
        cos, sin = cos * rope.scale, sin * rope.scale
    return cos.to(torch.float32), sin.to(torch.float32)
