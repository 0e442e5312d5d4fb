"""``transform/high.py``'s ``ordered_sum`` in kernels: the same additions in the same order, so the same bits.

The reference folds: of n terms, term i and term ``i + ceil(n / 2)`` become one, as long as there is more than one.
After ``levels`` folds ``ceil(n / 2**levels)`` sums are left. Which terms are in a sum is told from its number, so a
program makes some sums from their terms at once, and another program folds what programs have left.

A program holds the terms of its sums in a tile ``(2**levels, sums)``: bit k of a term's row says on which side of the
fold ``k + 1`` it stood, so rows ``2 m`` and ``2 m + 1`` are added first. What is no term is zero there, which changes
no sum of squares, and of other sums the sign of a zero at most. **Launch with ``enable_fp_fusion=False``**: a product
that is fused with an addition is not rounded before it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tree_terms(sums: tl.tensor, rows: tl.tensor, COUNT: tl.constexpr, LEVELS: tl.constexpr) -> tl.tuple:
    """Which of ``COUNT`` terms belong in the tile, and which places hold one.

    Args:
        sums: int32 ``(1, sums)``: numbers of sums after ``LEVELS`` folds; those that there are not have no terms.
        rows: int32 ``(2**LEVELS, 1)``: 0, 1, ….
        COUNT: terms in all.
        LEVELS: folds.
    """
    index = sums + tl.zeros_like(rows)
    exists = index < (COUNT + (1 << LEVELS) - 1) >> LEVELS
    for fold in tl.static_range(LEVELS):
        level = LEVELS - fold
        index += (rows >> (level - 1) & 1) * ((COUNT + (1 << level) - 1) >> level)
        exists &= index < (COUNT + (1 << (level - 1)) - 1) >> (level - 1)
    return index, exists


@triton.jit
def tree_sum(terms: tl.tensor, LEVELS: tl.constexpr, SUMS: tl.constexpr) -> tl.tensor:
    """The sums ``(SUMS,)`` of a tile of terms ``(2**LEVELS, SUMS)``, which are zero where there is none."""
    for fold in tl.static_range(LEVELS):
        pairs = tl.reshape(terms, (1 << (LEVELS - 1 - fold), 2, SUMS))
        terms = tl.sum(pairs, axis=1)
    return tl.reshape(terms, (SUMS,))


def folds(count: int) -> int:
    """How many it takes until one sum is left of ``count`` terms."""
    return (count - 1).bit_length()
