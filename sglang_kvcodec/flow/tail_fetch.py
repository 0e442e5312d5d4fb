"""Fetches the end of a prefix, the last blocks first, for as long as that is of use."""

from __future__ import annotations

import time

from sglang_kvcodec.flow.arrivals import Arrivals
from sglang_kvcodec.flow.fetch_planning import PlannedFetch
from sglang_kvcodec.flow.pacing import PROGRESS, Pacer
from sglang_kvcodec.flow.prediction import Prefix
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.namespace import PageKey


class TailFetcher:
    """Runs such fetches, on threads of its callers'."""

    def __init__(self, transfers: Transfers, arrivals: Arrivals, pacer: Pacer) -> None:
        """No fetch is under way.

        Args:
            transfers: bring the blocks.
            arrivals: keep their pages.
            pacer: says what is known beside the other fetches.
        """
        self._transfers = transfers
        self._arrivals = arrivals
        self._pacer = pacer

    def fetch(self, planned: PlannedFetch, tail: Tail) -> list[PageKey]:
        """Fetches until both ends meet; the first block that does not come whole is the last one.

        Args:
            planned: what the request asked for; its flight is told how much is left.
            tail: told what has landed; says what is of use.

        Returns:
            The keys of pages that came and can't be read.

        Raises:
            PeerError: the peer fails; what has landed stays good.
        """
        ticket, flight, deadline_s = planned.ticket, planned.flight, planned.deadline_s
        namespaces = planned.chosen.namespaces
        damaged: list[PageKey] = []
        prefix = tail.prefix
        while time.monotonic() < deadline_s and not tail.stop.is_set():
            block = tail.next_block(self._pacer.knowledge(flight))
            if block is None:
                break
            first, end = block
            while namespaces[first] != namespaces[end - 1]:
                first += 1
            tail.shorten(first)
            sizes = prefix.page_bytes[first:end]
            before = prefix.tokens_before + first * prefix.page_tokens
            prompt_tokens = max(prefix.prompt_tokens, before + 1)
            flight.begin(PROGRESS, time.monotonic(), Prefix(sizes, prefix.page_tokens, before, prompt_tokens))
            wanted = ticket.page_hashes[first:end]
            receiver = self._arrivals.receiver([PageKey(namespaces[first], page_hash) for page_hash in wanted], sizes)
            events = self._transfers.events(namespaces[first], wanted, tail.stop, ticket.rid)
            try:
                for event in events:
                    receiver.add((0, event))
                    if receiver.is_complete or time.monotonic() > deadline_s:
                        break
                    flight.progress(receiver.received_bytes, receiver.whole_pages)
            finally:
                events.close()
                receiver.end("overtaken")
            pages = receiver.whole_prefix()
            damaged += self._arrivals.keep(receiver, wanted, pages)
            if len(pages) < len(wanted):
                break
            tail.landed(first, pages)
        return damaged
