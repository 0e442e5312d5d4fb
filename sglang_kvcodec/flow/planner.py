"""Decides how much of a stored prefix is worth fetching: a pure function with a reason in words.

It minimises the time to the first token that is predicted (``flow/prediction.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sglang_kvcodec.flow.blocks import overlappable_s
from sglang_kvcodec.flow.prediction import Knowledge, Prediction, Prefix, predict

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
BLIND_S = 2.0
"""As long as nothing is known of prefill, a fetch may be predicted to take so long at most."""


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
    known, and where every hit is taken, it is the best tier of those that bring most pages. Where none pays, what is
    doubted of restoring is not known.

    Args:
        choices: one for each tier, the best first; at least one.
        bounds: what the operator allows.
        was_fetching: whether the last such prefix was fetched, see :func:`plan_fetch`.
        always: take every hit.

    Returns:
        The index of the choice, and its plan.
    """
    plans = [plan_fetch(choice.prefix, choice.known, bounds, was_fetching, always) for choice in choices]
    if not any(plan.pages for plan in plans):
        plans = [
            plan_fetch(choice.prefix, _without_doubts(choice.known), bounds, was_fetching, always) for choice in choices
        ]
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


def _without_doubts(known: Knowledge) -> Knowledge:
    is_doubted = known.restore is not None and known.restore.is_doubted
    return dataclasses.replace(known, restore=None) if is_doubted else known


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
