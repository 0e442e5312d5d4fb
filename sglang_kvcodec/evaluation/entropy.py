"""Entropy of symbols under a distribution of their own for each channel: what an ideal arithmetic coder would reach."""

from __future__ import annotations

import numpy as np
import torch


def channel_entropy_bits(symbols: torch.Tensor) -> torch.Tensor:
    """Bits per symbol of each layer, with one distribution per channel, which costs nothing to know.

    The distributions are those of the symbols themselves (the plug-in estimate), so with few symbols per channel the
    figure is below what any coder can reach.

    Args:
        symbols: whole numbers ``(layers, symbols, channels)``.

    Returns:
        float64 ``(layers,)``.
    """
    return torch.tensor([_layer_entropy_bits(layer.to(torch.int64)) for layer in symbols], dtype=torch.float64)


def _layer_entropy_bits(symbols: torch.Tensor) -> float:
    count, channels = symbols.shape
    if count == 0:
        return 0.0
    # numbering the symbols that occur keeps the histogram small whatever their range is
    alphabet, index = np.unique(symbols.numpy(), return_inverse=True)
    cells = index.reshape(count, channels) + np.arange(channels) * len(alphabet)
    frequency = np.bincount(cells.ravel(), minlength=channels * len(alphabet)) / count
    occurring = frequency[frequency > 0]
    return float(-(occurring * np.log2(occurring)).sum() / channels)
