"""Decides how much of a stored prefix is worth fetching: a pure function with a reason in words.

What it minimises is the predicted time to the first token, with the pipeline as it is. Pages are decoded and restored
layer group by layer group while the forward pass over the rest of the prompt follows one group behind: with ``k`` pages
that have landed in host memory this takes

    after(k) = max(restore(k) + forward(k) / groups, restore(k) / groups + forward(k))

where ``forward(k)`` computes what is left of the prompt, and ``ttft(0)`` is the prefill. Where a request is admitted
when all has landed, ``ttft(k) = fetch(k) + after(k)``. Where it is admitted so that nobody has to wait for the network
(``flow/early_admission.py``), all of it overlaps but for the ends:

    ttft(k) = max(landed(k), round trip + after(k))

``landed(k)`` hangs on two moments of the fetch. When the last byte has landed, its part has yet to be restored and the
last layers to be computed; when the first layer group of the last block has, the forward pass can begin, and the
restore of the last segment. Waiting for other prefills is left out: it comes on top of either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.flow.rates import PrefillModel, RestoreModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NOT_STORED = "not_stored"
TOO_SHORT = "too_short"
WHOLE_PREFIX = "whole_prefix"
PART = "part"
LEARNING = "learning"
CUT_TO_HOST_MEMORY = "cut_to_host_memory"
LINK_TOO_SLOW = "link_too_slow"
RESTORE_TOO_SLOW = "restore_too_slow"
BOTH_ENDS = "both_ends"
REASONS = (
    NOT_STORED,
    TOO_SHORT,
    WHOLE_PREFIX,
    PART,
    LEARNING,
    CUT_TO_HOST_MEMORY,
    LINK_TOO_SLOW,
    RESTORE_TOO_SLOW,
    BOTH_ENDS,
)

PREFER_SHARE = 0.05
"""A smaller tier has to be predicted to save this share of what the better one takes: quality that is free is kept."""
SWITCH_SHARE = 0.15
"""And this share in the middle of a fetch, so that what is measured does not drive it to and fro."""
TAKE_GAIN = 0.1
"""Where the last prefix of such a length was computed, the next is fetched if that is predicted to save this share."""
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
BLIND_S = 2.0
"""As long as nothing is known of prefill, a fetch may be predicted to take so long at most."""


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


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a plan must keep to.

    Attributes:
        min_tokens: a shorter prefix is computed.
        max_bytes: more is never fetched for one request: it would not fit into host memory.
    """

    min_tokens: int
    max_bytes: int


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
    """

    round_trip_s: float
    bytes_per_s: float | None
    others_bytes: Sequence[int]
    restore: RestoreModel | None
    prefill: PrefillModel | None
    overlaps: bool = False
    message_bytes: float = 0.0
    link_shortfall: float | None = None


NOTHING_KNOWN = Knowledge(0.0, None, (), None, None)


@dataclasses.dataclass(frozen=True)
class FetchPlan:
    """What to do for one request.

    Attributes:
        pages: fetch this many pages, counted from the first missing one; 0 is a plain prefill.
        reason: one of :data:`REASONS`, a metric label.
        words: why, for the log and the trace.
        ttft_s: predicted, with these pages; None where prefill is not known.
        prefill_s: the same without a page.
        fetch_s: predicted time of the fetch.
        tier: profile of the pages, once that is known.
        first_page: the first that is fetched; those before are computed meanwhile (``flow/meeting.py``).
        pass_tokens: of a pass that computes them; 0 for any.
        overlap_s: how long the end of the fetch may take that comes while the request is restored and computed; 0 where
            nothing is known of that, or the request waits for all of it.
    """

    pages: int
    reason: str
    words: str = ""
    ttft_s: float | None = None
    prefill_s: float | None = None
    fetch_s: float | None = None
    tier: str = ""
    first_page: int = 0
    pass_tokens: int = 0
    overlap_s: float = 0.0


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
    forward_s = _forward_s(prefix, known.prefill, pages)
    if (restore := known.restore) is None:
        return Prediction(fetch_s, np.zeros(len(pages)), forward_s, forward_s, fetch_s + forward_s)
    groups = restore.layer_groups
    segments = -(-pages // restore.segment_pages)
    work_s = (segments * restore.parts * restore.part_s + coded_bytes * restore.byte_s) / restore.threads
    restore_s = np.where(pages > 0, work_s + np.maximum(0.0, restore.queued_s - fetch_s), 0.0)
    after_s = np.maximum(restore_s + forward_s / groups, restore_s / groups + forward_s)
    ttft_s = fetch_s + after_s
    if known.overlaps and known.bytes_per_s is not None and known.prefill is not None:
        queued_s = np.maximum(known.round_trip_s, restore.queued_s)
        at_once_s = queued_s + np.maximum(work_s + forward_s / groups, work_s / groups + forward_s)
        segment_bytes = coded_bytes * np.minimum(1.0, restore.segment_pages / np.maximum(1, pages))
        overlap_s = overlappable_s(after_s, fetch_s, forward_s[0])
        blocks, last_share = _blocks(pages, prefix, known, restore.segment_pages, overlap_s)
        # Each is asked for when the one before it has come.
        fetch_s += known.round_trip_s * (blocks - 1)
        first_group_s = fetch_s * (1 - last_share * (1 - 1 / groups))
        landed_s = _landed_s(fetch_s, first_group_s, segment_bytes, forward_s, restore)
        ttft_s = np.where(pages > 0, np.minimum(ttft_s, np.maximum(landed_s, at_once_s)), ttft_s)
    return Prediction(fetch_s, restore_s, forward_s, after_s, ttft_s)


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


def _blocks(
    pages: Ints, prefix: Prefix, known: Knowledge, segment_pages: int, overlap_s: Floats
) -> tuple[Ints, Floats]:
    """How many blocks each number of pages is fetched in, and the share of the pages in the last of them.

    ``overlap_s`` is how long the last block may take, with each of these numbers.
    """
    assert known.bytes_per_s is not None
    page_bytes = sum(prefix.page_bytes) / max(1, len(prefix.page_bytes))
    block = np.array(
        [block_pages(known.bytes_per_s, page_bytes, count, segment_pages, known.round_trip_s) for count in pages]
    )
    last = np.maximum(LAST_BLOCKS * block, overlap_s * known.bytes_per_s / max(1.0, page_bytes))
    before = np.maximum(0, np.ceil((pages - last) / block)).astype(np.int64)
    share: Floats = (pages - block * before) / np.maximum(1, pages)
    return before + 1, share


def _landed_s(
    fetch_s: Floats, first_group_s: Floats, segment_bytes: Floats, forward_s: Floats, restore: RestoreModel
) -> Floats:
    """First token, as far as it hangs on when bytes land: the last one, and the first layer group of the last block."""
    groups = restore.layer_groups
    last_part_s = restore.part_s + segment_bytes / restore.parts * restore.byte_s
    segment_s = (restore.parts * restore.part_s + segment_bytes * restore.byte_s) / restore.threads
    after_first_s = np.maximum(segment_s + forward_s / groups, segment_s / groups + forward_s)
    after_last_s: Floats = fetch_s + last_part_s + forward_s / groups
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
    groups = restore.layer_groups
    after_s = max(restore_s + forward_s / groups, restore_s / groups + forward_s)
    if missing_bytes <= 0:
        return Rest(landing_s, 0.0, after_s)
    if last_block_bytes is None:
        overlap_s = overlappable_s(np.array([after_s]), np.array([coded_bytes / max(bytes_per_s, 1e-9)]), prefill_s)
        blocks, share = _blocks(np.array([pages]), prefix, known, restore.segment_pages, overlap_s)
        landing_s += known.round_trip_s * int((blocks[0] - 1) * missing_bytes / coded_bytes)
        last_block_bytes = float(share[0]) * coded_bytes
    # As much of the last block comes after its first layer group.
    later_bytes = min(missing_bytes, last_block_bytes * (1 - 1 / groups))
    first_group_s = landing_s * (1 - later_bytes / missing_bytes)
    segment_bytes = np.array([coded_bytes * min(1.0, restore.segment_pages / pages)])
    landed_s = _landed_s(
        np.array([landing_s]), np.array([first_group_s]), segment_bytes, np.array([forward_s]), restore
    )[0]
    return Rest(landing_s, float(landed_s), after_s)


def _forward_s(prefix: Prefix, prefill: PrefillModel | None, pages: Ints) -> Floats:
    if prefill is None:
        return np.zeros(len(pages))
    before = prefix.tokens_before + pages * prefix.page_tokens
    new = np.maximum(1, prefix.prompt_tokens - before)
    # The first pass runs beside the restore.
    forward_s: Floats = prefill.seconds_of(new, before) + prefill.restored_s * pages * prefix.page_tokens
    return forward_s


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
    forward_s = prefill.seconds(1, page_tokens) + prefill.restored_s * page_tokens
    restore_s = restore.seconds(pages, coded_bytes) + restore.queued_s
    groups = restore.layer_groups
    hit_s = max(restore_s + forward_s / groups, restore_s / groups + forward_s)
    return hit_s <= prefill.seconds(page_tokens + 1, 0)


def plan_fetch(
    prefix: Prefix, known: Knowledge, bounds: Bounds, was_fetching: bool = True, always: bool = False
) -> FetchPlan:
    """Plans the fetch of a stored prefix.

    Never more pages than the bounds allow, and never a number of pages that is predicted to be slower than prefill.
    While bandwidth or restoring is not known it is taken to cost nothing, and while prefill is not known whatever
    arrives in :data:`BLIND_S` is fetched: so all of it gets known.

    Args:
        prefix: what is stored.
        known: what was measured.
        bounds: what the operator allows.
        was_fetching: whether the last such prefix was fetched; if not, the gain has to be :data:`TAKE_GAIN` at least,
            so that the noise of what is measured does not make every other request take the other way.
        always: take every hit that the bounds allow, as if it cost nothing.
    """
    stored = len(prefix.page_bytes)
    if stored == 0:
        return FetchPlan(0, NOT_STORED, "the peer has none of it")
    fewest = max(1, -(-bounds.min_tokens // prefix.page_tokens))
    sizes = np.cumsum(np.asarray(prefix.page_bytes, dtype=np.float64))
    most = int(np.searchsorted(sizes, bounds.max_bytes, side="right"))
    if most < fewest:
        return FetchPlan(0, TOO_SHORT, f"{min(stored, most)} pages at most, {fewest} at least")
    prediction = predict(prefix, known)
    prefill_s = float(prediction.ttft_s[0]) if known.prefill is not None else None
    if always:
        pages, best_s = most, float(prediction.ttft_s[most])
    elif prefill_s is None:
        ready_s = prediction.fetch_s + prediction.restore_s
        pages = int(np.searchsorted(np.maximum.accumulate(ready_s[: most + 1]), BLIND_S, side="right")) - 1
        best_s = float(ready_s[max(pages, 0)])
        if pages < fewest:
            words = f"prefill is not known, and {fewest} pages take {ready_s[fewest]:.3g} s"
            return FetchPlan(0, _slower(prediction, fewest), words)
    else:
        # The last of the best: what is stored anyway need not be computed.
        choices = prediction.ttft_s[fewest : most + 1]
        pages = most - int(np.argmin(choices[::-1]))
        best_s = float(prediction.ttft_s[pages])
        if best_s > prefill_s * (1.0 if was_fetching else 1.0 - TAKE_GAIN):
            words = f"{_figures(prediction, most)}, prefill {prefill_s:.3g} s"
            return FetchPlan(0, _slower(prediction, most), words, prefill_s, prefill_s, 0.0)
    fetch_s = float(prediction.fetch_s[pages])
    if always:
        reason = WHOLE_PREFIX if pages == stored else CUT_TO_HOST_MEMORY
    elif prefill_s is None or known.bytes_per_s is None or known.restore is None:
        reason = LEARNING
    elif pages == stored:
        reason = WHOLE_PREFIX
    else:
        reason = CUT_TO_HOST_MEMORY if pages == most else PART
    against = "prefill not known" if prefill_s is None else f"prefill {prefill_s:.3g} s"
    words = f"{_figures(prediction, pages)}, {against}"
    overlap_s = 0.0
    if known.overlaps and known.restore is not None and prefill_s is not None:
        after_s = prediction.after_s[pages : pages + 1]
        # Where every hit is taken, none is given up.
        longest_s = after_s if always else overlappable_s(after_s, prediction.fetch_s[pages : pages + 1], prefill_s)
        overlap_s = float(longest_s[0])
    return FetchPlan(
        pages, reason, words, None if prefill_s is None else best_s, prefill_s, fetch_s, overlap_s=overlap_s
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What could be fetched: one tier where it is stored, and others where it is not.

    Attributes:
        prefix: its pages.
        known: what was measured, of that tier.
    """

    prefix: Prefix
    known: Knowledge


def plan_tiers(
    choices: Sequence[Choice], bounds: Bounds, was_fetching: bool = True, always: bool = False
) -> tuple[int, FetchPlan]:
    """Plans the fetch of a prefix of which several tiers are stored: which of them, and how much.

    It is the one with the lowest predicted time to the first token, but for :data:`PREFER_SHARE`. While prefill is not
    known, and where every hit is taken, it is the best tier of those that bring most pages.

    Args:
        choices: one for each tier, the best first; at least one.
        bounds: what the operator allows.
        was_fetching: whether the last such prefix was fetched, see :func:`plan_fetch`.
        always: take every hit.

    Returns:
        The index of the choice, and its plan.
    """
    plans = [plan_fetch(choice.prefix, choice.known, bounds, was_fetching, always) for choice in choices]
    best = 0
    for index, plan in enumerate(plans[1:], 1):
        if _is_better(plan, plans[best], always):
            best = index
    if len(plans) == 1 or not plans[best].pages:
        return best, plans[best]
    others = ", ".join(
        f"choice {index} {plan.ttft_s:.3g} s" if plan.ttft_s is not None else f"choice {index} {plan.pages} pages"
        for index, plan in enumerate(plans)
        if index != best
    )
    return best, dataclasses.replace(plans[best], words=f"choice {best}: {plans[best].words}; {others}")


def _is_better(plan: FetchPlan, than: FetchPlan, always: bool) -> bool:
    """Whether the plan of a smaller tier is to be preferred."""
    if always or plan.ttft_s is None or than.ttft_s is None:
        return plan.pages > than.pages
    return plan.pages > 0 and plan.ttft_s < than.ttft_s * (1 - PREFER_SHARE)


def choose_rest(choices: Sequence[Choice], current: int) -> int:
    """Which tier to go on with in the middle of a fetch, at a page of which nothing has arrived.

    Args:
        choices: as of :func:`plan_tiers`, of the pages that are left; of what would be fetched once more all, and of
            what the current one has under way what is missing.
        current: the one that is being fetched.

    Returns:
        An index; ``current`` unless another saves :data:`SWITCH_SHARE`, or a better tier would take no longer.
    """
    rests_s = [float(predict(choice.prefix, choice.known).ttft_s[-1]) for choice in choices]
    if choices[current].known.bytes_per_s is None:
        return current
    better = next((index for index in range(current) if rests_s[index] <= rests_s[current]), current)
    fastest = int(np.argmin(rests_s))
    return fastest if rests_s[fastest] < rests_s[better] * (1 - SWITCH_SHARE) else better


def _slower(prediction: Prediction, pages: int) -> str:
    return LINK_TOO_SLOW if prediction.fetch_s[pages] >= prediction.restore_s[pages] else RESTORE_TOO_SLOW


def _figures(prediction: Prediction, pages: int) -> str:
    return (
        f"{pages} of {len(prediction.ttft_s) - 1} pages: fetch {prediction.fetch_s[pages]:.3g} s, "
        f"restore {prediction.restore_s[pages]:.3g} s, forward {prediction.forward_s[pages]:.3g} s"
    )
