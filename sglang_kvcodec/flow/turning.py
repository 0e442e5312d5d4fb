"""Turns a fetch round whose link has failed: the request is computed from where it is while the other end is fetched.

Whether a link that has gone silent is dead, slow or pausing can't be known, and each calls for something else. This is
right for all of them: the model goes on from the pages that are whole, and what the link still brings, the last pages
first, shortens that (``flow/meeting.py``). So it can be done early, long before the fetch were to be given up for good.
"""

from __future__ import annotations

import dataclasses

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_planning import PlannedFetch
from sglang_kvcodec.flow.meeting import predict_meeting
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.prefix_fetch import Fetched
from sglang_kvcodec.flow.tail import Tail


def turn(
    planned: PlannedFetch, fetched: Fetched, known: Knowledge, min_tokens: int
) -> tuple[PlannedFetch, Tail] | None:
    """What to do with a fetch that was given up; None if that is to compute all that it has not brought.

    Args:
        planned: the fetch.
        fetched: what it has brought.
        known: what was measured; of the link no more counts than what it looked like when it was given up.
        min_tokens: fewer are not fetched.
    """
    ticket = planned.ticket
    doubted = planned.flight.given_up_at_bytes_per_s
    if not planned.flight.may_turn or ticket.is_cancelled or not doubted or known.prefill is None:
        return None
    stored, head = planned.prefixes[fetched.choice], len(fetched.pages)
    page_tokens = planned.prefix.page_tokens
    end = min(planned.plan.pages, stored.pages)
    if (end - head) * page_tokens < max(min_tokens, 2 * page_tokens):
        return None
    before = planned.prefix.tokens_before + head * page_tokens
    rest = Prefix(stored.page_bytes[head:end], page_tokens, before, max(planned.prefix.prompt_tokens, before + 1))
    bytes_per_s = doubted if known.bytes_per_s is None else min(doubted, known.bytes_per_s)
    meeting = predict_meeting(rest, dataclasses.replace(known, bytes_per_s=bytes_per_s), end - head)
    if meeting is None:
        return None
    prefix = dataclasses.replace(planned.prefix, page_bytes=stored.page_bytes[:end])
    tail = Tail(prefix, head + meeting.first_page, meeting.pass_tokens, head, doubted)
    metrics.FETCHES_TURNED.inc()
    return dataclasses.replace(planned, choice=fetched.choice, prefix=prefix), tail
