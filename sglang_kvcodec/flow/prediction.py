"""Predicts how long it takes to fetch a part of a stored prefix and to compute the rest of the prompt.

What is predicted is the time to the first token, with the pipeline as it is. Pages are decoded and restored
layer group by layer group while the forward pass over the rest of the prompt follows one group behind: with ``k`` pages
that have landed in host memory this takes

    after(k) = max(restore(k) + forward(k) / groups, restore(k) / groups + forward(k))

where ``forward(k)`` computes what is left of the prompt, and ``ttft(0)`` is the prefill. Where a request is admitted
when all has landed, ``ttft(k) = fetch(k) + after(k)``. Where it is admitted so that nobody has to wait for the network
(``flow/early_admission.py``), all of it overlaps but for the ends:

    ttft(k) = max(landed(k), round trip + after(k))

Where others use the model, a request whose forward pass would wait for its restore waits outside of their batch until
it is over (``plugin/ahead.py``): then ``after(k) = restore(k) + forward(k)``.

``landed(k)`` hangs on two moments of the fetch. When the last byte has landed, its part has yet to be restored and the
last layers to be computed; when the first layer group of the last block has, the forward pass can begin, and the
restore of the last segment. Waiting for other prefills is left out: it comes on top of either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.flow.blocks import Floats, Ints, in_blocks, overlappable_s
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel

Bools = npt.NDArray[np.bool_]

MOST_WAIT_S, MOST_WAIT_SHARE = 0.01, 0.1
"""So long, or so much of what it computes, a forward pass that others share may wait for what is restored beside it."""
LONG_WAIT_S, LITTLE_SHARE = 0.25, 0.05
"""A pass of a request that is alone waits no longer than the first of these where it has less than the second of that
to compute: whoever comes meanwhile would wait with it, and overlapping so little gains nothing."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is to be planned.

    Attributes:
        page_bytes: coded size of each page that the peer has, from the first missing one on, without a gap.
        page_tokens: tokens per page.
        tokens_before: tokens of the prompt before them, which are there already.
        prompt_tokens: of the whole prompt; at least one is always computed.
    """

    page_bytes: Sequence[int]
    page_tokens: int
    tokens_before: int
    prompt_tokens: int

    @property
    def mean_page_bytes(self) -> float:
        """Of a page; 0 of none."""
        return sum(self.page_bytes) / max(1, len(self.page_bytes))


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What was measured; None where nothing is known.

    Attributes:
        round_trip_s: of the peer.
        bytes_per_s: from it, all fetches together.
        others_bytes: what each fetch under way has yet to receive. They share the link evenly.
        restore: decoding and restoring.
        prefill: computing.
        overlaps: whether a request is admitted before all has landed, where enough is known to tell when.
        message_bytes: that come at once; 0 where that is not known.
        link_shortfall: share by which the link was slower at times; None where that is not known.
        are_others: whether others use the model.
    """

    round_trip_s: float
    bytes_per_s: float | None
    others_bytes: Sequence[int]
    restore: RestoreModel | None
    prefill: PrefillModel | None
    overlaps: bool = False
    message_bytes: float = 0.0
    link_shortfall: float | None = None
    are_others: bool = False


NOTHING_KNOWN = Knowledge(0.0, None, (), None, None)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """For every number of pages from 0 on, float64 seconds.

    Attributes:
        fetch_s: until they are in host memory.
        restore_s: from then until they are in the pool.
        forward_s: to compute the rest of the prompt; zeros where prefill is not known.
        after_s: from when they are in host memory to the first token.
        ttft_s: of all.
    """

    fetch_s: Floats
    restore_s: Floats
    forward_s: Floats
    after_s: Floats
    ttft_s: Floats


def predict(prefix: Prefix, known: Knowledge) -> Prediction:
    """How long each number of pages would take; what is not known is taken to cost nothing."""
    pages = np.arange(len(prefix.page_bytes) + 1)
    coded_bytes = np.concatenate([[0], np.cumsum(np.asarray(prefix.page_bytes, dtype=np.float64))])
    fetch_s = np.where(pages > 0, known.round_trip_s, 0.0)
    if known.bytes_per_s is not None:
        # Processor sharing: while ours runs, each of the others gets as much as ours, until it is through.
        ahead = sum((np.minimum(coded_bytes, other) for other in known.others_bytes), np.zeros(len(pages)))
        # A link that carries nothing takes for ever, but no page takes no time.
        fetch_s += (coded_bytes + ahead) / max(known.bytes_per_s, 1e-9)
    forward_s = alone_s = _forward_s(prefix, known.prefill, pages)
    if (restore := known.restore) is None:
        return Prediction(fetch_s, np.zeros(len(pages)), forward_s, forward_s, fetch_s + forward_s)
    groups = restore.layer_groups
    segments = -(-pages // restore.segment_pages)
    work_s = (segments * restore.parts * restore.part_s + coded_bytes * restore.byte_s) / restore.threads
    restore_s = np.where(pages > 0, work_s + np.maximum(0.0, restore.queued_s - fetch_s), 0.0)
    forward_s = alone_s + _slowed_s(prefix, known.prefill, pages, work_s)
    is_ahead = _is_ahead(restore_s, forward_s, groups, known.are_others)
    forward_s = np.where(is_ahead, alone_s, forward_s)
    after_s = _after_s(restore_s, forward_s, groups, is_ahead)
    ttft_s = fetch_s + after_s
    if known.overlaps and known.bytes_per_s is not None and known.prefill is not None:
        queued_s = np.maximum(known.round_trip_s, restore.queued_s)
        at_once_s = queued_s + _after_s(work_s, forward_s, groups, is_ahead)
        segment_bytes = coded_bytes * np.minimum(1.0, restore.segment_pages / np.maximum(1, pages))
        overlap_s = overlappable_s(after_s, fetch_s, forward_s[0])
        blocks, last_share = in_blocks(
            pages, prefix.mean_page_bytes, known.bytes_per_s, restore.segment_pages, known.round_trip_s, overlap_s
        )
        # Each is asked for when the one before it has come.
        fetch_s += known.round_trip_s * (blocks - 1)
        first_group_s = fetch_s * (1 - last_share * (1 - 1 / groups))
        landed_s = _landed_s(fetch_s, first_group_s, segment_bytes, forward_s, restore, is_ahead)
        ttft_s = np.where(pages > 0, np.minimum(ttft_s, np.maximum(landed_s, at_once_s)), ttft_s)
    return Prediction(fetch_s, restore_s, forward_s, after_s, ttft_s)


def _is_ahead(restore_s: Floats, forward_s: Floats, groups: int, are_others: bool) -> Bools:
    """Whether the restore ends before the forward pass begins: others would have to wait for it."""
    waits_s = np.maximum(restore_s + forward_s / groups, restore_s / groups + forward_s) - forward_s
    if are_others:
        return waits_s > np.maximum(MOST_WAIT_S, MOST_WAIT_SHARE * forward_s)
    return (waits_s > LONG_WAIT_S) & (forward_s < LITTLE_SHARE * waits_s)


def _after_s(restore_s: Floats, forward_s: Floats, groups: int, is_ahead: Bools) -> Floats:
    """Restore and forward pass, one after the other or one layer group behind it."""
    together_s = np.maximum(restore_s + forward_s / groups, restore_s / groups + forward_s)
    return np.where(is_ahead, restore_s + forward_s, together_s)


def _landed_s(
    fetch_s: Floats,
    first_group_s: Floats,
    segment_bytes: Floats,
    forward_s: Floats,
    restore: RestoreModel,
    is_ahead: Bools,
) -> Floats:
    """First token, as far as it hangs on when bytes land: the last one, and the first layer group of the last block."""
    groups = restore.layer_groups
    last_part_s = restore.part_s + segment_bytes / restore.parts * restore.byte_s
    segment_s = (restore.parts * restore.part_s + segment_bytes * restore.byte_s) / restore.threads
    after_first_s = _after_s(segment_s, forward_s, groups, is_ahead)
    after_last_s: Floats = fetch_s + last_part_s + np.where(is_ahead, forward_s, forward_s / groups)
    # A layer group that is there already keeps nobody waiting.
    return np.where(first_group_s > 0, np.maximum(after_last_s, first_group_s + after_first_s), after_last_s)


@dataclasses.dataclass(frozen=True)
class Rest:
    """What is left of a fetch under way, from now on, in seconds.

    Attributes:
        landing_s: until all is in host memory.
        landed_s: to the first token, as far as it hangs on when bytes land.
        after_s: to the first token if all were in host memory now.
    """

    landing_s: float
    landed_s: float
    after_s: float

    @property
    def first_token_s(self) -> float:
        """To the first token, if the restore begins now."""
        return max(self.landed_s, self.after_s)

    @property
    def stall_s(self) -> float:
        """How long restore and forward pass would have to wait for bytes if they began now."""
        return max(0.0, self.landed_s - self.after_s)


def predict_rest(
    prefix: Prefix,
    missing_bytes: float,
    known: Knowledge,
    margin: float = 0.0,
    last_block_bytes: float | None = None,
) -> Rest | None:
    """What is left of a fetch of all pages of ``prefix``; None where too little is known.

    Args:
        prefix: the pages that are being fetched.
        missing_bytes: of them.
        known: what was measured.
        margin: share by which the link may be slower.
        last_block_bytes: of the block under way, if that is the last one; None if it is not.
    """
    restore, prefill, bytes_per_s = known.restore, known.prefill, known.bytes_per_s
    if restore is None or prefill is None or bytes_per_s is None or not prefix.page_bytes:
        return None
    pages, coded_bytes = len(prefix.page_bytes), sum(prefix.page_bytes)
    shared_bytes = missing_bytes + sum(min(missing_bytes, other) for other in known.others_bytes)
    landing_s = shared_bytes / max(bytes_per_s, 1e-9) * (1 + margin)
    restore_s = restore.seconds(pages, coded_bytes) + restore.queued_s
    prefill_s, forward_s = _forward_s(prefix, prefill, np.array([0, pages])).tolist()
    forward_s += float(_slowed_s(prefix, prefill, np.array([pages]), restore.seconds(pages, coded_bytes))[0])
    groups = restore.layer_groups
    restores_s, forwards_s = np.array([restore_s]), np.array([forward_s])
    is_ahead = _is_ahead(restores_s, forwards_s, groups, known.are_others)
    after_s = float(_after_s(restores_s, forwards_s, groups, is_ahead)[0])
    if missing_bytes <= 0:
        return Rest(landing_s, 0.0, after_s)
    if last_block_bytes is None:
        overlap_s = overlappable_s(np.array([after_s]), np.array([coded_bytes / max(bytes_per_s, 1e-9)]), prefill_s)
        blocks, share = in_blocks(
            np.array([pages]),
            prefix.mean_page_bytes,
            bytes_per_s,
            restore.segment_pages,
            known.round_trip_s,
            overlap_s,
        )
        landing_s += known.round_trip_s * int((blocks[0] - 1) * missing_bytes / coded_bytes)
        last_block_bytes = float(share[0]) * coded_bytes
    # As much of the last block comes after its first layer group.
    later_bytes = min(missing_bytes, last_block_bytes * (1 - 1 / groups))
    first_group_s = landing_s * (1 - later_bytes / missing_bytes)
    segment_bytes = np.array([coded_bytes * min(1.0, restore.segment_pages / pages)])
    landed_s = _landed_s(
        np.array([landing_s]), np.array([first_group_s]), segment_bytes, forwards_s, restore, is_ahead
    )[0]
    return Rest(landing_s, float(landed_s), after_s)


def _forward_s(prefix: Prefix, prefill: PrefillModel | None, pages: Ints) -> Floats:
    if prefill is None:
        return np.zeros(len(pages))
    before = prefix.tokens_before + pages * prefix.page_tokens
    return prefill.seconds_of(np.maximum(1, prefix.prompt_tokens - before), before)


def _slowed_s(prefix: Prefix, prefill: PrefillModel | None, pages: Ints, work_s: Floats | float) -> Floats:
    """How much longer the forward pass takes because pages are restored beside it: no longer than that takes."""
    if prefill is None:
        return np.zeros(len(pages))
    slowed_s: Floats = np.minimum(prefill.restored_s * pages * prefix.page_tokens, work_s)
    return slowed_s


def restoring_pays(
    restore: RestoreModel, prefill: PrefillModel, pages: int, coded_bytes: int, page_tokens: int
) -> bool:
    """Whether restoring pages that are in host memory takes no longer than computing their tokens.

    Asked on a scheduler's thread each time a request is matched, and therefore without what follows them: one token.

    Args:
        restore: what decoding and restoring take.
        prefill: what computing takes.
        pages: how many.
        coded_bytes: of all of them.
        page_tokens: of all of them.
    """
    work_s = restore.seconds(pages, coded_bytes)
    forward_s = prefill.seconds(1, page_tokens) + min(prefill.restored_s * page_tokens, work_s)
    restore_s = work_s + restore.queued_s
    groups = restore.layer_groups
    hit_s = max(restore_s + forward_s / groups, restore_s / groups + forward_s)
    return hit_s <= prefill.seconds(page_tokens + 1, 0)


def holds_up(
    restore: RestoreModel,
    prefill: PrefillModel,
    pages: int,
    coded_bytes: int,
    prefix_tokens: int,
    prompt_tokens: int,
    are_others: bool,
) -> bool:
    """Whether a forward pass over the rest of a prompt would wait for its restore for longer than others should.

    Args:
        restore: what decoding and restoring take.
        prefill: what computing takes.
        pages: to restore.
        coded_bytes: of all of them.
        prefix_tokens: of the prompt, that are there then.
        prompt_tokens: of the whole prompt.
        are_others: whether somebody would wait with it, or may come.
    """
    forward_s = prefill.seconds(max(1, prompt_tokens - prefix_tokens), prefix_tokens)
    restore_s = restore.seconds(pages, coded_bytes) + restore.queued_s
    return bool(_is_ahead(np.array([restore_s]), np.array([forward_s]), restore.layer_groups, are_others)[0])
