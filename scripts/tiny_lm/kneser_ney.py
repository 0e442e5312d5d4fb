"""An n-gram model with interpolated modified Kneser-Ney smoothing, in NumPy.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 4.1.6: three
discounts per order, estimated from the counts of counts; lower orders count the different words before an n-gram
instead of its occurrences; the lowest order is mixed with the uniform distribution, so that no token has probability 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length.

    Attributes:
        keys: packed n-grams, ascending.
        mass: what each keeps of its context's probability: (count - discount) / count of the context.
        contexts: packed (n-1)-grams that were continued, ascending.
        backoff: what the discounts took from each context, as a share.
    """

    keys: Keys
    mass: Floats
    contexts: Keys
    backoff: Floats


class KneserNey:
    """P(token | the ``order - 1`` tokens before it), from the n-grams of one stream of tokens."""

    def __init__(self, stream: npt.NDArray[np.integer], order: int, vocabulary: int) -> None:
        """Counts and smooths.

        Args:
            stream: ``(tokens,)`` of ids below ``vocabulary``; documents divided by a token of their own.
            order: n; a context has n - 1 tokens.
            vocabulary: number of ids.

        Raises:
            ValueError: n-grams of that order don't pack into 64 bits, or the stream is shorter than one.
        """
        self.bits = max(vocabulary - 1, 1).bit_length()
        if order < 1 or order * self.bits > 64:
            raise ValueError(f"{order} tokens of {self.bits} bits do not fit into 64")
        if len(stream) < order:
            raise ValueError(f"{len(stream)} tokens are no text for order {order}")
        self.order, self.vocabulary = order, vocabulary
        keys, counts = np.unique(_windows(stream.astype(np.uint64), order, self.bits), return_counts=True)
        orders = []
        for length in range(order, 0, -1):
            orders.append(_smooth(keys, counts.astype(np.float64), self.bits))
            if length > 1:  # how many different tokens stand before each shorter n-gram
                shorter = keys & np.uint64((1 << (length - 1) * self.bits) - 1)
                keys, counts = np.unique(shorter, return_counts=True)
        self._orders: Sequence[_Order] = orders[::-1]

    def probabilities(self, tokens: npt.NDArray[np.integer]) -> Floats:
        """P of each token after the ones before it: ``(tokens,)`` -> ``(tokens,)`` float64.

        The first ``order - 1`` are predicted from as many tokens as stand before them.
        """
        ids = tokens.astype(np.uint64)
        result = np.full(len(ids), 1.0 / self.vocabulary)
        for length, table in enumerate(self._orders, start=1):
            if len(ids) < length:
                break
            keys = _windows(ids, length, self.bits)
            backoff = _find(table.contexts, table.backoff, keys >> np.uint64(self.bits), missing=1.0)
            mass = _find(table.keys, table.mass, keys, missing=0.0)
            result[length - 1 :] = mass + backoff * result[length - 1 :]
        return result


def _windows(ids: Keys, length: int, bits: int) -> Keys:
    """Each run of ``length`` ids packed into one integer, the last id lowest: ``(n,)`` -> ``(n - length + 1,)``."""
    count = len(ids) - length + 1
    packed = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        packed = (packed << np.uint64(bits)) | ids[offset : offset + count]
    return packed


def _smooth(keys: Keys, counts: Floats, bits: int) -> _Order:
    discounts = _discounts(counts)[np.minimum(counts, 3).astype(np.int64)]
    contexts, starts = np.unique(keys >> np.uint64(bits), return_index=True)
    totals = np.add.reduceat(counts, starts)
    sizes = np.diff(np.append(starts, len(keys)))
    mass = (counts - discounts) / np.repeat(totals, sizes)
    return _Order(keys, mass, contexts, np.add.reduceat(discounts, starts) / totals)


def _discounts(counts: Floats) -> Floats:
    """What to take from an n-gram seen 0, 1, 2, and 3 or more times: ``(4,)`` (Chen and Goodman, equation 17).

    Where a text is too small or too odd for an estimate, which would be nothing, or more than there is to take, half of
    the count is taken, as by KenLM's ``--discount_fallback``: a context that gave nothing away would leave tokens
    without any probability.
    """
    n = [float(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4)]
    result = np.array([0.0, 0.5, 1.0, 1.5])
    for times in (1, 2, 3):
        if n[0] and n[times - 1]:
            estimate = times - (times + 1) * n[0] / (n[0] + 2 * n[1]) * n[times] / n[times - 1]
            if 0 < estimate < times:
                result[times] = estimate
    return result


def _find(keys: Keys, values: Floats, wanted: Keys, missing: float) -> Floats:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)
