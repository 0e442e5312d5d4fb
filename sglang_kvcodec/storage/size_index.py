"""Sizes of stored objects in memory: a Lookup of a thousand pages needs no thousand searches through a tree on disk.

Sixteen bytes for each object: a fingerprint of its key, in a sorted array, and its size. What has changed since the
array was made is in a dictionary before it, until a thread makes the next array of both. Readers take no lock.

A fingerprint has 64 bits and is of a family that is drawn at random (multilinear hashing: Carter and Wegman, 1979;
Lemire and Kaser, arXiv 1202.4961). Two keys have the same one by chance once in 2^63 pairs; of keys that somebody makes
up for it once in 2^33 pairs, and he can't see it. Then an object is taken to be there that a Fetch does not find, or to
be as large as another.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.storage.base import KEY_BYTES

Fingerprints = npt.NDArray[np.uint64]
Batch = tuple[Sequence[bytes], Sequence[int]]
"""Keys and the sizes of their objects."""

_WORDS = KEY_BYTES // 4
_GONE = -1
_BITS_IN_BUCKET = 4
"""Of the number of fingerprints: eight to sixteen of them share their first bits."""
LEAST_CHANGES = 1 << 14
"""Changes before another array is made."""
CHANGED_SHARE = 1 / 32
"""The same, of the objects."""
_REST_S = 0.001
"""Between two batches of a walk, for those who want the interpreter's lock."""

logger = logging.getLogger(__name__)


class _Known(NamedTuple):
    """Sorted fingerprints with their sizes, and where those that begin with the same bits begin.

    Fingerprints are spread evenly, so few share their first bits: a search is among these, and takes a tenth of one
    among all, which would miss the processor's caches at each step.
    """

    fingerprints: Fingerprints
    sizes: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    steps: int

    @classmethod
    def of(cls, fingerprints: Fingerprints, sizes: npt.NDArray[np.int64]) -> _Known:
        """Of fingerprints in any order."""
        order = np.argsort(fingerprints, kind="stable")
        fingerprints, sizes = fingerprints[order], sizes[order]
        bits = max(1, len(fingerprints).bit_length() - _BITS_IN_BUCKET)
        lowest = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
        begins = np.append(np.searchsorted(fingerprints, lowest), len(fingerprints)).astype(np.int64)
        return cls(fingerprints, sizes, begins, int(np.diff(begins).max()).bit_length())

    def find(self, wanted: Fingerprints) -> npt.NDArray[np.int64]:
        """Of each the size, :data:`_GONE` where it is not there."""
        last = len(self.fingerprints) - 1
        if last < 0:
            return np.full(len(wanted), _GONE, np.int64)
        # The bits that count are as many as there are places where they begin, but for the end.
        shift = np.uint64(64 - (len(self.begins) - 1).bit_length() + 1)
        buckets = (wanted >> shift).astype(np.int64)
        low, high = self.begins[buckets], self.begins[buckets + 1]
        for _ in range(self.steps):
            middle = (low + high) >> 1
            is_before = (low < high) & (self.fingerprints[np.minimum(middle, last)] < wanted)
            low, high = np.where(is_before, middle + 1, low), np.where(is_before, high, middle)
        places = np.minimum(low, last)
        return np.where(self.fingerprints[places] == wanted, self.sizes[places], _GONE)


class _State(NamedTuple):
    """What readers see at once; the later dictionary counts."""

    known: _Known
    older_changes: dict[int, int]
    changes: dict[int, int]


class SizeIndex:
    """Of one store. Whoever changes the store says so after the change is on the disk."""

    def __init__(self, walk: Callable[[], Iterator[Batch]]) -> None:
        """Starts to collect what is there, on a thread of its own; until it has, it says nothing.

        Args:
            walk: goes through the store once, batch by batch; what changes meanwhile may be in it or not.
        """
        self._walk = walk
        self._factors = np.frombuffer(secrets.token_bytes(8 * _WORDS), np.uint64)
        self._changed = threading.Condition()
        self._state = _State(_Known.of(np.empty(0, np.uint64), np.empty(0, np.int64)), {}, {})
        self._is_ready = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvcodec-lmdb-index", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it knows all objects."""
        return self._is_ready

    def sizes(self, keys: Sequence[bytes]) -> list[int | None] | None:
        """Of each object its size in bytes, None where there is none; None instead of all while that is not known."""
        if not self._is_ready:
            return None
        state, fingerprints = self._state, self._fingerprints(keys)
        found: list[int] = state.known.find(fingerprints).tolist()
        for changes in (state.older_changes, state.changes):
            if changes:
                for index, fingerprint in enumerate(fingerprints.tolist()):
                    if (size := changes.get(fingerprint)) is not None:
                        found[index] = size
        if _GONE not in found:
            return [*found]
        return [None if size == _GONE else size for size in found]

    def change(self, sizes: Mapping[bytes, int | None]) -> None:
        """Objects are there now, with their sizes in bytes, or are gone, with None."""
        if not sizes:
            return
        fingerprints = self._fingerprints([*sizes]).tolist()
        with self._changed:
            for fingerprint, size in zip(fingerprints, sizes.values(), strict=True):
                self._state.changes[fingerprint] = _GONE if size is None else size
            if self._has_many_changes():
                self._changed.notify_all()

    def close(self) -> None:
        """Ends its thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _fingerprints(self, keys: Sequence[bytes]) -> Fingerprints:
        words = np.frombuffer(b"".join(keys), np.uint32).reshape(len(keys), _WORDS)
        product: Fingerprints = words.astype(np.uint64) @ self._factors
        return product

    def _has_many_changes(self) -> bool:
        return len(self._state.changes) >= max(LEAST_CHANGES, CHANGED_SHARE * len(self._state.known.sizes))

    # ---- its thread ----

    def _run(self) -> None:
        try:
            if self._collect():
                while self._wait_for_changes():
                    self._merge()
        except Exception:
            # A thread's top: sizes are read from the store instead.
            self._is_ready = False
            logger.exception("the index of the store ended")

    def _collect(self) -> bool:
        started_s = time.monotonic()
        fingerprints, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for keys, sizes_bytes in self._walk():
            if self._closed:
                return False
            fingerprints.append(self._fingerprints(keys))
            sizes.append(np.array(sizes_bytes, np.int64))
            time.sleep(_REST_S)
        self._replace(np.concatenate(fingerprints), np.concatenate(sizes))
        self._is_ready = True
        logger.info(
            "index of %d objects in memory after %.1f s", len(self._state.known.sizes), time.monotonic() - started_s
        )
        return True

    def _wait_for_changes(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_many_changes())
            if self._closed:
                return False
            state = self._state
            self._state = _State(state.known, state.changes, {})
            return True

    def _merge(self) -> None:
        state = self._state
        changed = np.fromiter(state.older_changes.keys(), np.uint64, len(state.older_changes))
        sizes = np.fromiter(state.older_changes.values(), np.int64, len(state.older_changes))
        stays = ~np.isin(state.known.fingerprints, changed)
        is_there = sizes != _GONE
        self._replace(
            np.concatenate([state.known.fingerprints[stays], changed[is_there]]),
            np.concatenate([state.known.sizes[stays], sizes[is_there]]),
        )

    def _replace(self, fingerprints: Fingerprints, sizes: npt.NDArray[np.int64]) -> None:
        known = _Known.of(fingerprints, sizes)
        with self._changed:
            self._state = _State(known, {}, self._state.changes)
