"""Finds out what of a request's prefix is stored, and plans what of it to fetch."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.flow.fetch_endings import OVERTAKEN
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.meeting import plan_meeting
from sglang_kvcodec.flow.pacing import Flight, Pacer
from sglang_kvcodec.flow.planner import Bounds, Choice, FetchPlan, plan_tiers
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.stored_prefix import PrefixLookup, StoredPrefix, Tier
from sglang_kvcodec.flow.trace import Tracer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlannedFetch:
    """A fetch of which is known what it is to bring.

    Attributes:
        ticket: of its request.
        flight: in which the pacer sees it.
        prefixes: what is stored: the longest prefix, in each tier.
        choice: which of them to fetch.
        plan: how much of it.
        prefix: the pages that will be fetched; where that are none, those that are stored.
        at_s: when it was planned.
        deadline_s: when it ends in any case.
    """

    ticket: FetchTicket
    flight: Flight
    prefixes: Sequence[StoredPrefix]
    choice: int
    plan: FetchPlan
    prefix: Prefix
    at_s: float
    deadline_s: float

    @property
    def chosen(self) -> StoredPrefix:
        """The stored prefix that is fetched."""
        return self.prefixes[self.choice]


def what_is_known(rates: Rates, admits_early: bool, profile_name: str = "") -> Knowledge:
    """What is known now of a tier, or of all together, but for the other fetches."""
    return Knowledge(
        rates.link.round_trip_s,
        rates.link.bytes_per_s(),
        (),
        rates.restore.model(profile_name=profile_name),
        rates.prefill.model(),
        admits_early,
        rates.link.message_bytes,
        rates.link.shortfall,
    )


class FetchPlanning:
    """Looks up and plans, on threads of its callers'."""

    def __init__(
        self, prefixes: PrefixLookup, pacer: Pacer, config: ServerConfig, page_tokens: int, tracer: Tracer
    ) -> None:
        """Nothing is planned.

        Args:
            prefixes: asks the peer.
            pacer: says what is known beside the fetches under way.
            config: bounds, time-outs, and whether all that is stored is fetched.
            page_tokens: of a page.
            tracer: told of lookups and plans.
        """
        self._prefixes = prefixes
        self._pacer = pacer
        self._config = config
        self._page_tokens = page_tokens
        self._tracer = tracer
        self._always = config.plan == "always"
        self._was_fetching: dict[int, bool] = {}
        """Magnitude of a stored prefix -> what was done with the last such one."""

    def prepare(self, ticket: FetchTicket, tiers: Sequence[Tier], flight: Flight) -> tuple[str, PlannedFetch | None]:
        """Looks up and plans; why it ended here if it does, and the plan if there is one.

        Raises:
            PeerError: the peer did not answer.
        """
        if ticket.is_cancelled or ticket.was_cut():
            return "cancelled", None
        start_s = time.monotonic()
        deadline_s = ticket.start_s + self._config.timeouts.fetch_s
        if start_s > deadline_s:
            return "too_slow", None
        self._tracer.span(ticket.rid, "lookup queue", ticket.start_s, start_s)
        prefixes = self._prefixes.find(tiers, ticket.page_hashes)
        metrics.LOOKUP_SECONDS.observe(time.monotonic() - start_s)
        covered_pages = max(prefix.pages for prefix in prefixes)
        ticket.stored_pages = covered_pages
        asked_pages = len(ticket.page_hashes)
        self._tracer.span(
            ticket.rid, "lookup", start_s, time.monotonic(), asked_pages=asked_pages, stored_pages=covered_pages
        )
        metrics.LOOKUP_PAGES.labels(outcome="stored").inc(covered_pages)
        metrics.LOOKUP_PAGES.labels(outcome="missing").inc(asked_pages - covered_pages)
        if ticket.was_cut():
            return OVERTAKEN, None
        choice, plan, prefix = self._plan(ticket, prefixes, flight)
        if plan.pages:
            prefix = dataclasses.replace(prefix, page_bytes=prefix.page_bytes[: plan.pages])
        planned = PlannedFetch(ticket, flight, prefixes, choice, plan, prefix, time.monotonic(), deadline_s)
        return plan.reason, planned

    def _plan(
        self, ticket: FetchTicket, prefixes: Sequence[StoredPrefix], flight: Flight
    ) -> tuple[int, FetchPlan, Prefix]:
        """Which of the stored prefixes, the plan, and what is stored of it."""
        bounds = Bounds(self._config.min_fetch_tokens, self._config.host_cache_bytes)
        magnitude = max(prefix.pages for prefix in prefixes).bit_length()
        was_fetching = self._was_fetching.get(magnitude, True)
        choices = [
            Choice(
                Prefix(stored.page_bytes, self._page_tokens, ticket.tokens_before, ticket.prompt_tokens),
                self._pacer.knowledge(flight, stored.profile_name if len(prefixes) > 1 else ""),
            )
            for stored in prefixes
        ]
        choice, plan = plan_tiers(choices, bounds, was_fetching, self._always)
        if ticket.may_compute and not self._always and self._config.compute_while_fetching != "failing":
            choice, plan = plan_meeting(choices, choice, plan, bounds)
        prefix = choices[choice].prefix
        plan = dataclasses.replace(plan, tier=prefixes[choice].profile_name)
        flight.profile_name = plan.tier if len(prefixes) > 1 else ""
        if plan.prefill_s is not None:
            self._was_fetching[magnitude] = plan.pages > 0
        metrics.PLANS.labels(reason=plan.reason).inc()
        if plan.pages:
            metrics.PLANNED_TIERS.labels(tier=plan.tier).inc()
        logger.debug("kvcodec: %s: %s", plan.reason, plan.words)
        now_s = time.monotonic()
        self._tracer.span(ticket.rid, "plan", now_s, now_s, **dataclasses.asdict(plan))
        ticket.plan = plan
        return choice, plan, prefix
