"""The low bits of wide components, kept out of the pictures.

HEVC codes a large residual with Golomb-Rice codes whose parameter starts at zero in each group of 4 x 4 samples: 7 to
10 % over the entropy at a deviation of 8 to 16 steps, where it is 4 to 6 % at 1.5. The low bits of such a component are
noise: stored as they are they cost next to nothing over their entropy, spare the decoder's entropy coder, and bring
values beyond +-127 back onto the canvas. So a component that gives up ``n`` low bits becomes ``high * 2**n + low``:
``high``, rounded to nearest, goes onto the canvas, and ``low`` takes ``n`` bits.

The stored bytes hold for each component in order, and for each of its bits, lowest first, a row of one bit per token:
the first token in the lowest bit of the first byte, the last byte filled up with zeros. With 64 tokens a row is one
little-endian 64-bit word. The bits are those of ``value + 2**(n - 1)``, so ``low`` is never negative.
"""

from __future__ import annotations

import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.calibration import MAX_LOW_BITS

_WIDEST_DEVIATION = 3.0
"""Least deviation, in steps, at which a component gives up a bit; what is left lies between half of that and that."""


def low_bit_counts(deviations: torch.Tensor) -> torch.Tensor:
    """How many low bits each component should give up. Part of a calibration, not of the format.

    Args:
        deviations: standard deviation of each quantised component, in steps, any shape.

    Returns:
        int32 of the same shape, 0 to 15.
    """
    ratio = (deviations.to(torch.float64) / (_WIDEST_DEVIATION / 2)).clamp(1.0, 2.0**MAX_LOW_BITS)
    return torch.floor(torch.log2(ratio)).to(torch.int32)


def low_bits_bytes(counts: torch.Tensor, page_tokens: int) -> int:
    """Bytes per page that :func:`split_low_bits` stores."""
    return int(counts.sum()) * -(-page_tokens // 8)


def split_low_bits(quantised: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the low bits away.

    Args:
        quantised: int32 ``(pages, page_tokens, components)``, below 2**30 in magnitude.
        counts: int32 ``(components,)``, 0 to 15.

    Returns:
        The high parts, int32 like ``quantised``; and the low bits, uint8 ``(pages, low_bits_bytes)``.
    """
    pages, tokens, _ = quantised.shape
    shifted = quantised + _halves(counts)
    high = shifted >> counts
    components, bits = _rows(counts)
    rows = (shifted.transpose(1, 2)[:, components] >> bits[:, None]) & 1
    padded = torch.nn.functional.pad(rows, (0, -tokens % 8)).reshape(pages, len(bits), -(-tokens // 8), 8)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=quantised.device)
    return high, (padded * weights).sum(-1).to(torch.uint8).flatten(1)


def join_low_bits(high: torch.Tensor, stored: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`split_low_bits`.

    Args:
        high: int32 ``(pages, page_tokens, components)``.
        stored: uint8 ``(pages, low_bits_bytes)``.
        counts: int32 ``(components,)``, 0 to 15.

    Returns:
        int32 ``(pages, page_tokens, components)``.

    Raises:
        FormatError: another number of stored bytes.
    """
    pages, tokens, _ = high.shape
    if tuple(stored.shape) != (pages, low_bits_bytes(counts, tokens)):
        raise FormatError(f"low bits of shape {tuple(stored.shape)} do not match their components")
    components, bits = _rows(counts)
    shifts = torch.arange(8, dtype=torch.int32, device=high.device)
    row_bytes = stored.to(torch.int32).reshape(pages, len(bits), -(-tokens // 8), 1)
    rows = (row_bytes >> shifts & 1).flatten(2)[..., :tokens]
    joined = (high << counts) - _halves(counts)
    return joined.transpose(1, 2).index_add(1, components, rows << bits[:, None]).transpose(1, 2).contiguous()


def _halves(counts: torch.Tensor) -> torch.Tensor:
    """Half of the step between two high parts: 0 for a component that keeps its low bits."""
    return (1 << counts) >> 1


def _rows(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Component (int64) and bit (int32) of each row of stored bits."""
    wide = counts.to(torch.int64)
    components = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), wide)
    first_row = torch.cumsum(wide, 0) - wide
    bits = torch.arange(len(components), device=counts.device) - first_row[components]
    return components, bits.to(torch.int32)
