"""Learns from forward passes: how long prefill takes, and whether first tokens come when they were expected."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.prefill_meter import PrefillMeter
from sglang_kvcodec.flow.trace import Tracer

MAX_EXPECTED = 1 << 12
MAX_WAITED_SHARE = 0.5
"""A pass that has waited for its layers longer than this share says little of prefill."""


class PassObserver:
    """Of one scheduler; all methods run on its thread."""

    def __init__(self, prefill: PrefillMeter, tracer: Tracer | None = None) -> None:
        """Expects nothing."""
        self._tracer = tracer or Tracer()
        self._prefill = prefill
        self._busy_us = 0
        self._loaded: dict[int, tuple[float, int]] = {}
        """Number of a pass whose prefixes were restored beside it -> seconds that it waited, and how many tokens."""
        self._ran_s: dict[int, float] = {}
        self._expected: collections.OrderedDict[str, FetchTicket] = collections.OrderedDict()

    def expect(self, rid: str, ticket: FetchTicket) -> None:
        """A request is to be followed to its first token; the oldest are forgotten."""
        self._expected[rid] = ticket
        self._expected.move_to_end(rid)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def forget(self, rid: str) -> None:
        """The request is gone."""
        self._expected.pop(rid, None)

    def loaded(self, pass_number: int, waited_s: float, restored_tokens: int) -> None:
        """So many tokens are restored beside a pass, whose thread has waited so long for layers of them."""
        metrics.LAYER_WAIT_SECONDS.observe(waited_s)
        self._loaded[pass_number] = waited_s, restored_tokens

    def ran(self, pass_number: int, seconds: float) -> None:
        """A pass ran on the scheduler's own thread, as on a CPU, and took so long.

        There SGLang's account says little of single passes: it goes by when results are looked at, and with overlap
        scheduling that is after the next pass.
        """
        self._ran_s[pass_number] = seconds

    def ended(self, batch: Any, prefill_busy_us: int) -> None:
        """A pass has ended.

        Args:
            batch: SGLang's ``ScheduleBatch``.
            prefill_busy_us: SGLang's own account of the time of all prefill passes, this one included.
        """
        took_s, self._busy_us = (prefill_busy_us - self._busy_us) / 1e6, prefill_busy_us
        ran_s = self._ran_s.pop(batch.forward_iter, None)
        took_s = took_s if ran_s is None else ran_s
        waited_s, restored_tokens = self._loaded.pop(batch.forward_iter, (0.0, 0))
        if not batch.forward_mode.is_extend():
            return
        if took_s > 0:
            metrics.FORWARD_SECONDS.observe(took_s)
        # On a device a pass waits where nobody sees how long.
        is_telling = not restored_tokens or ran_s is not None or not self._prefill.is_known
        if is_telling and took_s > 0 and waited_s <= MAX_WAITED_SHARE * took_s:
            self._prefill.forward_pass(batch.extend_lens, batch.prefix_lens, took_s - waited_s, restored_tokens)
        if self._tracer.is_on:
            self._trace(batch, took_s)
        if self._expected:
            self._first_tokens(batch.reqs)

    def _first_tokens(self, reqs: Sequence[Any]) -> None:
        for req in reqs:
            if req.rid in self._expected and req.output_ids:
                self._observe(self._expected.pop(req.rid))

    def _trace(self, batch: Any, took_s: float) -> None:
        """The pass, for each of its requests."""
        end_s = time.monotonic()
        for req, new, prefix in zip(batch.reqs, batch.extend_lens, batch.prefix_lens, strict=False):
            self._tracer.span(req.rid, "forward", end_s - took_s, end_s, new_tokens=new, prefix_tokens=prefix)

    def _observe(self, ticket: FetchTicket) -> None:
        plan, now_s = ticket.plan, time.monotonic()
        self._tracer.span(ticket.rid, "first token", ticket.start_s, now_s, prompt_tokens=ticket.prompt_tokens)
        if plan is None or plan.ttft_s is None:
            return
        choice = "both" if plan.first_page else "fetch" if plan.pages else "prefill"
        metrics.TTFT_PREDICTED_SECONDS.labels(choice=choice).observe(plan.ttft_s)
        metrics.TTFT_SECONDS.labels(choice=choice).observe(now_s - ticket.start_s)
