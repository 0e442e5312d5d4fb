"""A request whose restore failed after it was admitted is computed from its start, and its client notices nothing.

SGLang would answer it with 503. Instead the failed request ends silently and its input is handed to the scheduler
once more, as a new request of the same name; the pages that failed are not offered again.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_kvcodec.plugin.held_requests import HeldRequest

logger = logging.getLogger(__name__)

MAX_INPUTS = 1 << 14
"""Requests remembered; the oldest is forgotten first and then simply computed."""


class RestoreFailed(FINISH_ABORT):
    """Ends a request that will be computed instead. Never leaves the scheduler."""


class RetryBook:
    """Inputs of requests that may need a second start. Only these requests are given fetched pages."""

    def __init__(self) -> None:
        """Remembers nothing."""
        self._inputs: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._restarted: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._waits: dict[str, HeldRequest] = {}
        self._due: set[str] = set()
        """Requests that have failed and were not started again yet."""

    def note(self, tokenized: Any) -> None:
        """Remembers the input of a request that arrives, if it can be started twice.

        One with images can't: SGLang gives their shared memory back at the first start. Nor can one of a session,
        which the first start has changed.
        """
        if (
            tokenized.mm_inputs is not None
            or tokenized.session_params is not None
            or not isinstance(tokenized.rid, str)
        ):
            return
        self._inputs[tokenized.rid] = tokenized
        while len(self._inputs) > MAX_INPUTS:
            self._waits.pop(self._inputs.popitem(last=False)[0], None)

    def __contains__(self, rid: str) -> bool:
        return rid in self._inputs

    def forget(self, rid: str) -> None:
        """The request needs no second start any more, unless that is due.

        SGLang lets go of a request between two of its chunks before it says that it has ended.
        """
        if rid not in self._due:
            self._inputs.pop(rid, None)
            self._restarted.pop(rid, None)
            self._waits.pop(rid, None)

    def admitted(self, rid: str, wait: HeldRequest) -> None:
        """The request has waited for pages, and is in a batch now."""
        if rid in self._inputs:
            self._waits[rid] = wait

    def take_wait(self, rid: str) -> HeldRequest | None:
        """What the request has waited for, once; None if it has not."""
        return self._waits.pop(rid, None)

    def was_restarted(self, rid: str) -> bool:
        """Whether this is the request's second start."""
        return rid in self._restarted

    def mark_failed(self, reqs: Sequence[Any]) -> None:
        """Gives requests that SGLang is about to answer with 503 an end that is not sent."""
        for req in reqs:
            if req.rid in self._inputs:
                self._due.add(req.rid)
                req.discard_output_reason = RestoreFailed("kvcodec: restore failed; computed instead")

    def restart(self, req: Any, scheduler: Any) -> None:
        """Hands the request's input to the scheduler once more."""
        self._due.discard(req.rid)
        tokenized = self._inputs.get(req.rid)
        if tokenized is not None and not getattr(req, "_kvcodec_restarted", False):
            req._kvcodec_restarted = True
            self._restarted[req.rid] = None
            while len(self._restarted) > MAX_INPUTS:
                self._restarted.popitem(last=False)
            logger.warning("kvcodec: request %s is computed from its start", req.rid)
            scheduler.handle_generate_request(tokenized)
