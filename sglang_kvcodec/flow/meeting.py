"""Plans to compute the start of a stored prefix while its end is fetched, until both meet.

A request that waits for its pages leaves the model idle, and one that is computed leaves the link idle. Where fetching
and computing are about as fast, both together take about half the time of either, and a link that slows down on the
way costs next to nothing: the model just goes on. Cake describes the idea (Jin et al., "Compute Or Load KV Cache? Why
Not Both?", arXiv 2410.03065). With the pages from ``s`` to ``k`` fetched, last ones first,

    ttft(s) = max(compute(s), fetch(s..k) + restore of the last block) + half a pass + forward(k)

The start is computed in short passes, for only between passes can it be seen that the two have met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sglang_kvcodec.flow.planner import BOTH_ENDS, PREFER_SHARE, Bounds, Choice, FetchPlan
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel

PASS_DIVISORS = (1, 2, 4, 8, 16)
"""Passes that are tried: the start in so many."""
MOST_LONGER = 0.1
"""Where nothing comes, computing in those may take so much longer than in passes that SGLang likes."""
LEARNING_PASSES = 8
"""All of a prefix would take so many, while it is not known how long they take."""
BLOCKS = 8
"""Blocks that the end is fetched in, about; each costs a round trip, and the last one's restore comes on top."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where both are predicted to meet.

    Attributes:
        first_page: the first that is fetched; those before are computed.
        pass_tokens: of a pass that computes them.
        ttft_s: predicted.
        fetch_s: until the last page to come has landed.
    """

    first_page: int
    pass_tokens: int
    ttft_s: float
    fetch_s: float


def predict_meeting(prefix: Prefix, known: Knowledge, pages: int) -> Meeting | None:
    """The best place to meet; None where too little is known or there is too little to share.

    Args:
        prefix: what is stored.
        known: what was measured.
        pages: of the prefix that may be fetched.
    """
    prefill, restore, bytes_per_s = known.prefill, known.restore, known.bytes_per_s
    if prefill is None or restore is None or bytes_per_s is None or pages < 2:
        return None
    firsts = np.arange(1, pages)
    sizes = np.asarray(prefix.page_bytes[:pages], dtype=np.float64)
    coded_bytes = np.cumsum(sizes[::-1])[::-1][1:]
    ahead = sum((np.minimum(coded_bytes, other) for other in known.others_bytes), np.zeros(pages - 1))
    blocks = np.minimum(pages - firsts, BLOCKS)
    fetch_s = known.round_trip_s * blocks + (coded_bytes + ahead) / max(bytes_per_s, 1e-9)
    segments = -(-(pages - firsts) // restore.segment_pages)
    work_s = (segments * restore.parts * restore.part_s + coded_bytes * restore.byte_s) / restore.threads
    last_s = (restore.parts * restore.part_s + coded_bytes / blocks * restore.byte_s) / restore.threads
    ready_s = np.maximum(fetch_s, restore.queued_s + work_s) + last_s
    before = prefix.tokens_before + pages * prefix.page_tokens
    rest_s = prefill.seconds(max(1, prefix.prompt_tokens - before), before)
    best: Meeting | None = None
    # At first as if it could be seen at any moment that they have met.
    tokens, given = firsts * prefix.page_tokens, np.full(pages - 1, prefix.tokens_before)
    met_s = np.maximum(prefill.seconds_of(tokens, given), ready_s)
    guess = int(firsts[int(np.argmin(met_s))])
    for divisor in PASS_DIVISORS:
        pass_tokens = max(1, guess // divisor) * prefix.page_tokens
        if prefill.pass_tokens and pass_tokens > prefill.pass_tokens:
            continue
        pass_tokens = _not_too_short(prefill, pass_tokens, pages * prefix.page_tokens, prefix.tokens_before)
        passes = dataclasses.replace(prefill, pass_tokens=pass_tokens)
        compute_s = passes.seconds_of(tokens, given)
        half_s = compute_s / np.maximum(1, -(-tokens // pass_tokens)) / 2
        ttft_s = np.maximum(compute_s, ready_s) + half_s + rest_s
        index = int(np.argmin(ttft_s))
        if best is None or ttft_s[index] < best.ttft_s:
            best = Meeting(int(firsts[index]), pass_tokens, float(ttft_s[index]), float(fetch_s[index]))
    return best


def _not_too_short(prefill: PrefillModel, pass_tokens: int, new_tokens: int, prefix_tokens: int) -> int:
    """Tokens of a pass, at least those given, so that all can be computed in no more than a little longer."""
    most_tokens = min(prefill.pass_tokens or new_tokens, new_tokens)
    allowed_s = prefill.seconds(new_tokens, prefix_tokens) * (1 + MOST_LONGER)
    while pass_tokens < most_tokens:
        if dataclasses.replace(prefill, pass_tokens=pass_tokens).seconds(new_tokens, prefix_tokens) <= allowed_s:
            break
        pass_tokens = min(2 * pass_tokens, most_tokens)
    return pass_tokens


def plan_meeting(choices: Sequence[Choice], chosen: int, plan: FetchPlan, bounds: Bounds) -> tuple[int, FetchPlan]:
    """A plan in which both meet, if that is predicted to be no slower than ``plan``: it hardly minds a failing link.

    Args:
        choices: one for each tier, the best first.
        chosen: the one of ``plan``.
        plan: what would be done else, a fetch or a prefill.
        bounds: what the operator allows.

    Returns:
        The index of the choice, and its plan: the given ones unless meeting is better. While prefill is not known both
        ends are worked on in any case: that tells how fast either is, and takes hardly longer than the faster one.
    """
    if plan.ttft_s is None:
        return chosen, _learn(choices[chosen], plan)
    best: tuple[int, Meeting, int] | None = None
    for index, choice in enumerate(choices):
        sizes = np.cumsum(np.asarray(choice.prefix.page_bytes, dtype=np.float64))
        pages = int(np.searchsorted(sizes, bounds.max_bytes, side="right"))
        meeting = predict_meeting(choice.prefix, choice.known, pages)
        if meeting is None or (pages - meeting.first_page) * choice.prefix.page_tokens < bounds.min_tokens:
            continue
        if best is None or meeting.ttft_s < best[1].ttft_s * (1 - PREFER_SHARE):
            best = index, meeting, pages
    if best is None or best[1].ttft_s > plan.ttft_s:
        return chosen, plan
    index, meeting, pages = best
    words = (
        f"{meeting.first_page} of {pages} pages computed in passes of {meeting.pass_tokens} tokens while the others "
        f"are fetched: {meeting.ttft_s:.3g} s; else {plan.words}"
    )
    return index, FetchPlan(
        pages,
        BOTH_ENDS,
        words,
        meeting.ttft_s,
        plan.prefill_s,
        meeting.fetch_s,
        first_page=meeting.first_page,
        pass_tokens=meeting.pass_tokens,
    )


def _learn(choice: Choice, plan: FetchPlan) -> FetchPlan:
    """As a plan to fetch that is made without knowing how long computing takes, but computing as well."""
    if plan.pages < LEARNING_PASSES or choice.known.prefill is not None:
        return plan
    pass_tokens = plan.pages // LEARNING_PASSES * choice.prefix.page_tokens
    words = f"{plan.words}; computed in passes of {pass_tokens} tokens meanwhile"
    return dataclasses.replace(plan, reason=BOTH_ENDS, words=words, first_page=plan.pages // 2, pass_tokens=pass_tokens)
