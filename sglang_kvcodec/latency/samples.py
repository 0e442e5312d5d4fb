"""One measured request: its answer, and what the server's metrics say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang_kvcodec.config import LOSSLESS_PROFILES
from sglang_kvcodec.testing.sglang_client import ChatReply, Message, SGLangClient

PREFILL = "prefill"
"""The server without kvcodec, with its cache flushed."""
DEVICE = "device"
"""That server asked once more, with everything in its own KV pool: no fetch can be faster."""
PLANNER = "planner"
PLANNER_FIRST = "planner_first"
"""The planner's first request after a change of bandwidth, of which it can't know yet."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A server that is measured.

    Attributes:
        name: such as ``"prefill"``, ``"exact"``, ``"planner"``.
        profile: of ``--kvcodec-profile``; empty without kvcodec, or where it is not known.
        plan: of ``--kvcodec-plan``; empty likewise.
    """

    name: str
    profile: str = ""
    plan: str = ""

    @property
    def has_kvcodec(self) -> bool:
        """Whether it is a server with kvcodec."""
        return self.name != PREFILL

    @property
    def is_lossless(self) -> bool:
        """Whether every word must be that of a server without kvcodec."""
        return bool(self.profile) and set(self.profile.split(",")) <= set(LOSSLESS_PROFILES)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        method: who answered: the name of a method, ``DEVICE`` or ``PLANNER_FIRST``.
        bandwidth: of the peer.
        repeat: which prompt it was.
        reply: the answer.
        fetched_bytes: coded bytes that came from the peer.
        restored_bytes: of KV written into the pool.
        reasons: of the plan, none without one.
        tiers: that the plan took.
    """

    method: str
    bandwidth: str
    repeat: int
    reply: ChatReply
    fetched_bytes: float = 0.0
    restored_bytes: float = 0.0
    reasons: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a server with kvcodec has counted so far."""

    totals: dict[str, float]
    reasons: dict[str, float]
    tiers: dict[str, float]

    @classmethod
    def of(cls, client: SGLangClient) -> Counters:
        """As of now."""
        return cls(
            client.metrics(),
            client.metric_by("kvcodec_plans_total", "reason"),
            client.metric_by("kvcodec_planned_tiers_total", "tier"),
        )


def hit(client: SGLangClient, messages: Sequence[Message], answer_tokens: int) -> Sample:
    """One request to a server with kvcodec, of whose prompt it holds nothing itself. Method and place are left empty.

    Raises:
        OSError: the server is gone, or refused.
        TimeoutError: it would not forget what it holds.
    """
    client.forget()
    before = Counters.of(client)
    reply = client.chat(messages, answer_tokens)
    after = Counters.of(client)
    return Sample(
        "",
        "",
        0,
        reply,
        fetched_bytes=_grown(before.totals, after.totals, "kvcodec_fetched_bytes_total"),
        restored_bytes=_grown(before.totals, after.totals, "kvcodec_restored_bytes_total"),
        reasons=_those_grown(before.reasons, after.reasons),
        tiers=_those_grown(before.tiers, after.tiers),
    )


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def _those_grown(before: dict[str, float], after: dict[str, float]) -> tuple[str, ...]:
    return tuple(sorted(name for name in after if _grown(before, after, name) > 0))
