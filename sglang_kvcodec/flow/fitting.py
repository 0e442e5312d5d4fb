"""Fits how long something takes to how much of it there is, from samples as they come in."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_SAMPLES = 64
RECENT_SAMPLES = 5
"""Their median says how fast it is now: two of them may be outliers, and three of them are a change."""
_ROUNDS = 5
_HUBER = 1.5
_LEAST_SCALE = 0.02
_RIDGE = 1e-4
_PRIMARY_RIDGE = 1e-8
_MAX_LEVEL = 16.0


class OnlineFit:
    """``seconds = sum(coefficient * feature)`` with coefficients of at least zero; thread-safe.

    The shape comes from the last :data:`MAX_SAMPLES`: non-negative least squares of the relative error, reweighted so
    that outliers count little. The level comes from the last :data:`RECENT_SAMPLES`: the median of
    what they took over what the shape says. Adding a sample is an append; it is fitted when it is next asked for, which
    takes milliseconds: a scheduler's thread asks for what was fitted last.

    Where the samples can't tell features apart, all is put down to the primary one.
    """

    def __init__(self, features: int, primary: int) -> None:
        """A fit of nothing.

        Args:
            features: how many.
            primary: index of the one that explains a sample best if nothing else is known.
        """
        self._features = features
        self._ridge = np.full(features, _RIDGE)
        self._ridge[primary] = _PRIMARY_RIDGE
        self._samples: collections.deque[tuple[tuple[float, ...], float]] = collections.deque(maxlen=MAX_SAMPLES)
        self._fitted: tuple[float, ...] | None = None
        self._is_stale = False
        self._lock = threading.Lock()
        self._fitting = threading.Lock()

    def add(self, features: Sequence[float], seconds: float) -> None:
        """Takes a sample; one that took no time or had no features says nothing."""
        if not seconds > 0 or len(features) != self._features or not any(features):
            return
        with self._lock:
            self._samples.append((tuple(features), seconds))
            self._is_stale = True

    def forget(self) -> None:
        """Knows nothing again."""
        with self._lock:
            self._samples.clear()
            self._fitted, self._is_stale = None, False

    def coefficients(self, refit: bool = True) -> tuple[float, ...] | None:
        """Seconds per unit of each feature; None before the first sample.

        Args:
            refit: whether to take new samples into account; if not, this takes no time.
        """
        if not refit:
            return self._fitted
        # One at a time: who comes while another fits the first samples must not hear that nothing is known.
        with self._fitting:
            with self._lock:
                if not self._is_stale:
                    return self._fitted
                samples, self._is_stale = list(self._samples), False
            fitted = self._fit(samples)
            with self._lock:
                # Unless all was forgotten meanwhile.
                self._fitted = fitted if self._samples else None
                return self._fitted

    def _fit(self, samples: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, ...]:
        features = np.array([sample for sample, _ in samples])
        seconds = np.array([value for _, value in samples])
        scale = np.sqrt((features**2).mean(axis=0))
        used = [index for index in range(self._features) if scale[index] > 0]
        # Errors are relative to what the last round says: a sample that took far too little weighs no more than others.
        expected = np.full(len(seconds), float(np.median(seconds)))
        weights = np.ones(len(seconds))
        coefficients = np.zeros(self._features)
        for _ in range(_ROUNDS):
            rows = features[:, used] / expected[:, None]
            scale = np.sqrt((rows**2).mean(axis=0))
            solution = _non_negative(rows / scale, seconds / expected, weights, self._ridge[used])
            coefficients[used] = solution / scale
            predicted = features @ coefficients
            expected = np.maximum(predicted, 1e-3 * float(np.median(seconds)))
            error = np.abs(predicted - seconds) / expected
            bound = _HUBER * max(_LEAST_SCALE, 1.4826 * float(np.median(error)))
            weights = 1 / np.maximum(1, error / bound) ** 2
        return tuple((coefficients * _level(features, seconds, coefficients)).tolist())


def _non_negative(rows: Floats, values: Floats, weights: Floats, ridge: Floats) -> Floats:
    """The ``x >= 0`` for which ``rows @ x`` is closest to ``values``: the best of all choices of what is zero."""
    columns = rows.shape[1]
    gram = (rows * weights[:, None]).T @ rows / len(rows) + np.diag(ridge)
    target = (rows * weights[:, None]).T @ values / len(rows)
    whole = np.linalg.solve(gram, target)
    if (whole >= 0).all():
        return np.asarray(whole, dtype=np.float64)
    best, best_value = np.zeros(columns), 0.0
    for size in range(1, columns):
        for chosen in itertools.combinations(range(columns), size):
            part = np.linalg.solve(gram[np.ix_(chosen, chosen)], target[list(chosen)])
            # What is left of the error where the gradient is zero.
            value = -float(target[list(chosen)] @ part)
            if (part >= 0).all() and value < best_value:
                best_value = value
                best = np.zeros(columns)
                best[list(chosen)] = part
    return best


def _level(features: Floats, seconds: Floats, coefficients: Floats) -> float:
    """How much longer the last samples took than the fit says."""
    predicted = features[-RECENT_SAMPLES:] @ coefficients
    ratios = [taken / said for taken, said in zip(seconds[-RECENT_SAMPLES:], predicted, strict=True) if said > 0]
    if len(ratios) < RECENT_SAMPLES // 2 + 1:
        return 1.0
    return min(_MAX_LEVEL, max(1 / _MAX_LEVEL, float(np.median(ratios))))
