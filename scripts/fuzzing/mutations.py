"""Mutations without a library: the same ones for the same seed, for tests, and for machines without atheris."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

EDGES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
"""Numbers at which something changes."""
_MOST_BYTES = 1 << 16


def mutants(seeds: Sequence[bytes], seed: int, words: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The seeds, then for ever what comes of a few changes to one of them."""
    yield from seeds
    source = random.Random(seed)
    while True:
        data = bytearray(source.choice(seeds))
        for _ in range(source.choice((1, 1, 2, 4, 16))):
            _change(data, [*seeds, *words], source)
        yield bytes(data[:_MOST_BYTES])


def _change(data: bytearray, parts: Sequence[bytes], source: random.Random) -> None:
    at = _place(data, source)
    kind = source.randrange(9)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << source.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = source.randrange(256)
    elif kind == 2:
        del data[at : at + source.choice((1, 2, 4, 32, 1000))]
    elif kind == 3:
        data[at:at] = source.randbytes(source.choice((1, 2, 4, 32)))
    elif kind == 4:
        size = source.choice((1, 2, 4, 8))
        data[at : at + size] = (source.choice(EDGES) % 256**size).to_bytes(size, source.choice(("little", "big")))
    elif kind == 5:
        size = source.choice((4, 32, 500))
        data[at:at] = data[_place(data, source) :][:size]
    elif kind == 6:
        other = source.choice(parts)
        start = source.randrange(len(other)) if len(other) > 64 else 0
        data[at : at + source.choice((0, 1, 64))] = other[start : start + source.choice((8, 64, 2000))]
    elif kind == 7:
        del data[at:]
    elif at < len(data):
        # A varint that goes on, or ends.
        data[at] ^= 0x80


def _place(data: bytearray, source: random.Random) -> int:
    """Anywhere, and as often near the start, where heads are."""
    return source.randrange(min(len(data), source.choice((4, 64, 400, 1 << 30))) + 1) if data else 0
