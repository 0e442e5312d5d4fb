"""Which of several peers keep a page: rendezvous hashing of single pages.

By page, not by prefix. Prompts share their first pages, a system prompt for instance, so all that goes by the root of a
prefix would lie on one peer, and a Put names pages, not prefixes. By page each peer has its share of every prefix: what
is kept, sent and evicted is even, and a fetch has the bandwidth of all. The price is that a Lookup asks all of them, at
once, and that a peer which is lost takes pages out of every long prefix: so there are replicas.

A page belongs to the peers with the highest scores for it (Thaler and Ravishankar, "Using name-based mappings to
increase hit rates", 1998). So a peer that is added takes its share of each of the others, one that is removed gives its
own to them, and nothing else moves. The score is part of what clients agree on: the finalizer of splitmix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014) over the first eight bytes of page hash,
namespace and the peer's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Placement:
    """The order of preference of a fixed list of peers for any page."""

    def __init__(self, names: Sequence[str]) -> None:
        """Of the peers that are called ``names``: as all clients write them, in any order."""
        digests = (hashlib.sha256(name.encode()).digest() for name in names)
        self._seeds = np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)

    def order(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> npt.NDArray[np.intp]:
        """Indices of all peers for each page, the one that is to keep it first: ``(pages, peers)``."""
        heads = b"".join(page_hash[:8] for page_hash in page_hashes)
        pages = np.frombuffer(heads, dtype="<u8").astype(np.uint64)
        pages = pages ^ np.uint64(int.from_bytes(namespace_digest[:8], "little"))
        scores = _mixed(pages[:, None] ^ self._seeds[None, :])
        return np.argsort(~scores, axis=1, kind="stable")


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
