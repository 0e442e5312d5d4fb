"""Decides how much of a stored prefix is worth fetching: a pure function with a reason in words."""

from __future__ import annotations

import dataclasses

WHOLE_PREFIX = "whole_prefix"
CUT_TO_HOST_MEMORY = "cut_to_host_memory"


@dataclasses.dataclass(frozen=True)
class FetchPlan:
    """What to do for one request.

    Attributes:
        pages: fetch this many pages, counted from the first missing one; 0 is a plain prefill.
        reason: why, in words; a metric label and a log line.
    """

    pages: int
    reason: str


def plan_fetch(covered_pages: int, covered_bytes: int, page_tokens: int, min_tokens: int, max_bytes: int) -> FetchPlan:
    """Plans the fetch of a prefix of which the peer has ``covered_pages``.

    Args:
        covered_pages: pages the peer has, from the first missing one on, without a gap.
        covered_bytes: their coded size.
        page_tokens: tokens per page.
        min_tokens: a shorter prefix is computed.
        max_bytes: more is never fetched for one request: it would not fit into host memory.
    """
    if covered_pages == 0:
        return FetchPlan(0, "not_stored")
    if covered_pages * page_tokens < min_tokens:
        return FetchPlan(0, "too_short")
    if covered_bytes > max_bytes:
        # Pages differ in size: an estimate, which whoever receives them holds to the bytes.
        pages = covered_pages * max_bytes // covered_bytes
        if pages * page_tokens < min_tokens:
            return FetchPlan(0, "too_short")
        return FetchPlan(pages, CUT_TO_HOST_MEMORY)
    return FetchPlan(covered_pages, WHOLE_PREFIX)
