"""Messages between the stages of a pipeline: what each stage knows, and what the first one decides for all.

A stage of a pipeline goes through the same scheduling passes as the first one, later. So the first can't wait for what
the others say of a pass: they have not come to it. They report what they know as it changes, which threads of the first
collect; the first decides by what it has heard, and each of the others takes the decision when it comes to the same
place. SGLang's own storage tier works alike (``unified_radix_cache.py``, ``_pp_sync``).
"""

from __future__ import annotations

import collections
import datetime
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

FRAME_NUMBERS = 64
"""A report is a frame of so many numbers of eight bytes: its kind, how many numbers follow, and these."""
MOST_REPORTED = FRAME_NUMBERS - 2
_REPORT_TAG, _DECISION_TAG = 1, 2
_MOST_UNREAD = 64
"""Messages that may be on their way to another stage before the next one waits for the first of them."""
_FOREVER = datetime.timedelta(days=3650)
"""Gloo's own half an hour would end the listeners of an idle server."""
_LAST = -1
"""The kind of a stage's last report."""
_CLOSE_S = 5.0


class StageLink:
    """The end of one rank: the ranks at its place in the other stages are at the others. Numbers are of 63 bits."""

    def __init__(self, group: Any) -> None:
        """Connects; all ranks of the group do so at the same time.

        Args:
            group: SGLang's process group of the ranks with the same place in each stage, the first stage first.
        """
        ranks = torch.distributed.get_process_group_ranks(group)
        self._group: Any = torch.distributed.new_group(
            ranks, timeout=_FOREVER, backend="gloo", use_local_synchronization=True
        )
        self.stage = torch.distributed.get_rank(group)
        self.stages = len(ranks)
        self._on_way: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()
        self._listeners: list[threading.Thread] = []

    # ---- what the others know ----

    def report(self, kind: int, numbers: Sequence[int]) -> None:
        """Tells the first stage, without waiting for it.

        Args:
            kind: of the report, not negative; the first stage knows what it means.
            numbers: at most :data:`MOST_REPORTED`.
        """
        frame = torch.zeros(FRAME_NUMBERS, dtype=torch.int64)
        frame[: 2 + len(numbers)] = torch.tensor([kind, len(numbers), *numbers], dtype=torch.int64)
        self._send(frame, 0, _REPORT_TAG)

    def listen(self, on_report: Callable[[int, int, list[int]], None]) -> None:
        """At the first stage: starts to collect reports.

        Args:
            on_report: called on threads of its own with a stage, a kind and numbers, for each stage in order.
        """
        for stage in range(1, self.stages):
            name = f"kvcodec-stage-{stage}"
            listener = threading.Thread(target=self._listen, args=(stage, on_report), name=name, daemon=True)
            listener.start()
            self._listeners.append(listener)

    def _listen(self, stage: int, on_report: Callable[[int, int, list[int]], None]) -> None:
        frame = torch.zeros(FRAME_NUMBERS, dtype=torch.int64)
        while True:
            try:
                torch.distributed.recv(frame, group_src=stage, group=self._group, tag=_REPORT_TAG)
            except RuntimeError as error:
                # The stage has ended, and with it the server.
                logger.info("kvcodec: no more reports of stage %d: %s", stage, error)
                return
            kind, count, *numbers = frame.tolist()
            if kind == _LAST:
                return
            on_report(stage, kind, numbers[:count])

    # ---- what the first decides ----

    def decide(self, numbers: Sequence[int]) -> None:
        """At the first stage: tells all others."""
        for stage in range(1, self.stages):
            self._send(torch.tensor(numbers, dtype=torch.int64), stage, _DECISION_TAG)

    def decision(self, count: int) -> list[int]:
        """At another stage: the next decision, of so many numbers; the first stage has made it, or is about to."""
        numbers = torch.zeros(count, dtype=torch.int64)
        torch.distributed.recv(numbers, group_src=0, group=self._group, tag=_DECISION_TAG)
        decided: list[int] = numbers.tolist()
        return decided

    def close(self) -> None:
        """The last of it, at all stages: the first waits :data:`_CLOSE_S` for what the others still say.

        Gloo can't be told to give up a receive, and the interpreter ends the process with an error if its end meets a
        thread that comes back from one.
        """
        if self.stage:
            try:
                self.report(_LAST, [])
            except RuntimeError as error:
                logger.info("kvcodec: the first stage has ended before this one: %s", error)
        deadline_s = time.monotonic() + _CLOSE_S
        for listener in self._listeners:
            listener.join(max(0.0, deadline_s - time.monotonic()))

    def _send(self, numbers: torch.Tensor, stage: int, tag: int) -> None:
        work = torch.distributed.isend(numbers, group_dst=stage, group=self._group, tag=tag)
        # Gloo sends out of the tensor, and no sooner than the other side receives.
        self._on_way.append((work, numbers))
        while len(self._on_way) > _MOST_UNREAD * (self.stages - 1):
            self._on_way.popleft()[0].wait()
