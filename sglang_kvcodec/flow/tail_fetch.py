"""Fetches the end of a prefix, the last blocks first, for as long as that is of use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sglang_kvcodec.flow.pacing import PROGRESS, Flight
from sglang_kvcodec.flow.planner import Knowledge, Prefix
from sglang_kvcodec.flow.receiver import Receiver
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.flow.transfers import Transfers
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject

NewReceiver = Callable[[Sequence[PageKey], Sequence[int]], Receiver]
Settle = Callable[[Receiver, Sequence[bytes], Sequence[PageObject], list[PageKey]], None]


def fetch_tail(
    tail: Tail,
    namespaces: Sequence[bytes],
    page_hashes: Sequence[bytes],
    known: Callable[[], Knowledge],
    transfers: Transfers,
    new_receiver: NewReceiver,
    settle: Settle,
    flight: Flight,
    rid: str,
    deadline_s: float,
) -> list[PageKey]:
    """Fetches until both ends meet; the first block that does not come whole is the last one.

    Args:
        tail: told what has landed; says what is of use.
        namespaces: of each page.
        page_hashes: of each page.
        known: what is known now.
        transfers: bring the blocks.
        new_receiver: makes one of keys and sizes.
        settle: keeps what a receiver has got, and appends keys of damaged pages.
        flight: told how much is left, which others on the link ask for.
        rid: of the request, for the trace.
        deadline_s: of the monotonic clock, when it ends in any case.

    Returns:
        The keys of pages that came and can't be read.

    Raises:
        PeerError: the peer fails; what has landed stays good.
    """
    damaged: list[PageKey] = []
    prefix = tail.prefix
    while time.monotonic() < deadline_s and not tail.stop.is_set() and (block := tail.next_block(known())) is not None:
        first, end = block
        while namespaces[first] != namespaces[end - 1]:
            first += 1
        tail.shorten(first)
        sizes = prefix.page_bytes[first:end]
        before = prefix.tokens_before + first * prefix.page_tokens
        flight.begin(
            PROGRESS, time.monotonic(), Prefix(sizes, prefix.page_tokens, before, max(prefix.prompt_tokens, before + 1))
        )
        wanted = page_hashes[first:end]
        receiver = new_receiver([PageKey(namespaces[first], page_hash) for page_hash in wanted], sizes)
        events = transfers.events(namespaces[first], wanted, tail.stop, rid)
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
        settle(receiver, wanted, pages, damaged)
        if len(pages) < len(wanted):
            break
        tail.landed(first, pages)
    return damaged
