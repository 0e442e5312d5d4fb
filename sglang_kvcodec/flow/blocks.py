"""How large the blocks are in which pages are fetched."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BLOCK_S = 0.5
"""Pages are fetched in blocks that take so long on the link at most, but for the last one."""
BLOCK_SHARE = 1 / 6
"""A shorter fetch in blocks of this share: where it is given up in the middle, most of what came is whole."""
MIN_BLOCK_S = 0.05
ROUND_TRIPS_OF_A_BLOCK = 20
"""But each block costs a round trip, so it takes as long as these at least."""
LAST_BLOCKS = 2.5
"""So many blocks at most are fetched as one in the end, or as many as come while what is there is restored and computed
with: what comes layer group by layer group can be computed with before all of it is there."""
LATE_SHARE = 0.2
"""Where the link fails in the middle of that one, the first token may come so much later than if all were computed."""
NOTICE_S = 0.3
"""So long it takes to notice, and to go on with computing."""
FIRST_BLOCK_BYTES = 4 << 20
"""Of a block, while the link's bandwidth is not known."""


def block_s(fetch_s: float, round_trip_s: float) -> float:
    """How long a block of a fetch is to take on the link, and the whole fetch takes ``fetch_s``."""
    return min(BLOCK_S, max(MIN_BLOCK_S, ROUND_TRIPS_OF_A_BLOCK * round_trip_s, BLOCK_SHARE * fetch_s))


def block_pages(
    bytes_per_s: float | None, page_bytes: float, pages: int, segment_pages: int, round_trip_s: float = 0.0
) -> int:
    """Pages of a block: whole segments of the restorer, or of a smaller block a part that tiles one.

    A segment that lies across blocks could not be restored before the last of them comes.

    Args:
        bytes_per_s: of the link; None while that is not known.
        page_bytes: of a page.
        pages: of the whole fetch.
        segment_pages: pages that are decoded in one call, a power of two.
        round_trip_s: of the peer.
    """
    block_bytes: float = FIRST_BLOCK_BYTES
    if bytes_per_s is not None:
        block_bytes = bytes_per_s * block_s(pages * page_bytes / max(bytes_per_s, 1e-9), round_trip_s)
    block = int(block_bytes / max(1.0, page_bytes))
    if block >= segment_pages:
        return block // segment_pages * segment_pages
    return 1 << max(0, round(math.log2(max(1, block))))


def next_block(left_pages: int, block: int, overlap_pages: float = 0.0) -> int:
    """Pages of the next block, or of the last one.

    Args:
        left_pages: to be fetched.
        block: :func:`block_pages`.
        overlap_pages: that come while restore and forward pass are under way.
    """
    return left_pages if left_pages <= max(LAST_BLOCKS * block, overlap_pages) else block


def overlappable_s(after_s: Floats, fetch_s: Floats, prefill_s: float) -> Floats:
    """How long the last block may take on the link: as long as it can hide behind what comes after it.

    Where the link fails at its end nothing of it is of use. Then the fetch was in vain for as long as it took and that
    was not noticed, and the share of the last block has to be computed: together no more than :data:`LATE_SHARE` later
    than if all had been computed.
    """
    affordable_s = fetch_s * (1 + LATE_SHARE - (fetch_s + NOTICE_S) / max(prefill_s, 1e-9))
    overlap_s: Floats = np.clip(affordable_s, 0.0, after_s)
    return overlap_s


def in_blocks(
    pages: Ints,
    page_bytes: float,
    bytes_per_s: float,
    segment_pages: int,
    round_trip_s: float,
    overlap_s: Floats,
) -> tuple[Ints, Floats]:
    """How many blocks each number of pages is fetched in, and the share of the pages in the last of them.

    Args:
        pages: numbers of pages.
        page_bytes: of a page.
        bytes_per_s: of the link.
        segment_pages: see :func:`block_pages`.
        round_trip_s: of the peer.
        overlap_s: how long the last block may take, with each of these numbers.
    """
    block = np.array([block_pages(bytes_per_s, page_bytes, count, segment_pages, round_trip_s) for count in pages])
    last = np.maximum(LAST_BLOCKS * block, overlap_s * bytes_per_s / max(1.0, page_bytes))
    before = np.maximum(0, np.ceil((pages - last) / block)).astype(np.int64)
    share: Floats = (pages - block * before) / np.maximum(1, pages)
    return before + 1, share
