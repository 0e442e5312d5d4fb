"""The end of a stored prefix, on its way into the pool while the model computes the start of it.

Three threads work on it: one fetches block after block, the last ones first; the restorer's write them into slots that
were set aside; the scheduler's computes, and joins what it has computed with what is restored when they touch.
Nothing of it is ever waited for: whatever fails or comes late is computed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch

from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.blocks import MIN_BLOCK_S, ROUND_TRIPS_OF_A_BLOCK, block_pages
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore import Restore, RestoreJob, StartRestore
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.flow.streams import DeviceEvent
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import LayerGroup


@dataclasses.dataclass(eq=False)
class _Block:
    """Pages that were fetched together.

    Attributes:
        first: index of the first of them.
        pages: they themselves.
        events: after which all of it is in the pool; None before all of it is queued.
        runs: whether a restore may still write to its slots.
        restore: once it has begun.
    """

    first: int
    pages: Sequence[PageObject]
    events: list[DeviceEvent] | None = None
    runs: bool = False
    restore: Restore | None = None


@dataclasses.dataclass(frozen=True)
class Outlook:
    """How far a tail is, counted in pages of what was asked for.

    Attributes:
        restored_from: all from here to the end is in the pool; the end if nothing is.
        compute_until: computing more than this would be computing what is about to be there, and it pays to wait for
            that; else the end.
    """

    restored_from: int
    compute_until: int


class Tail:
    """The pages from some index to an end. Pages count from the first that was asked for."""

    def __init__(
        self,
        prefix: Prefix,
        first_page: int,
        pass_tokens: int,
        head_pages: int = 0,
        doubted_bytes_per_s: float | None = None,
    ) -> None:
        """Nothing has arrived.

        Args:
            prefix: all pages that were asked for and are stored, up to the end of the tail.
            first_page: where it is predicted to meet what is computed.
            pass_tokens: of the passes that compute the start.
            head_pages: that need not be computed.
            doubted_bytes_per_s: the link brings no more, or is not known to, before the first block has come.
        """
        self.prefix = prefix
        self.first_page = first_page
        """Fetching may go as far as to the middle between this and the head."""
        self.head_pages = head_pages
        self.pass_tokens = pass_tokens
        self._doubted_bytes_per_s = doubted_bytes_per_s
        self._prefill: PrefillModel | None = None
        self.end = len(prefix.page_bytes)
        self.stop = threading.Event()
        """Ends the transfer that is under way: what it brings is of no use any more."""
        self.joined_pages = 0
        self._lock = threading.Lock()
        self._low = self.end
        """The first page that has landed or is under way."""
        self._landed = self.end
        """The first page that has landed."""
        self._front = 0
        """What is computed, or is being computed, ends here."""
        self._blocks: list[_Block] = []
        self._slots: torch.Tensor | None = None
        self._slots_first = 0
        self._start_restore: StartRestore | None = None
        self._is_over = False
        self._has_failed = False

    @property
    def lowest_page(self) -> int:
        """The first page that may be fetched: the link may turn out faster than was thought."""
        return max(self.head_pages + 1, (self.head_pages + self.first_page) // 2)

    # ---- the thread that fetches ----

    def next_block(self, known: Knowledge) -> tuple[int, int] | None:
        """The pages to fetch next, from a first to an end; None where no more of them would be in time.

        What lies between is shared by both as fast as they are. A block is half of what is left to the link, so that
        the last ones are small: nothing of a block is of use before all of it is there.
        """
        with self._lock:
            high, low = self._low, max(self.lowest_page, self._front)
            if self._is_over or high <= low:
                return None
            known, is_doubted = self._as_doubted(known)
            self._prefill = known.prefill
            page_bytes = max(1.0, sum(self.prefix.page_bytes[low:high]) / (high - low))
            most = block_pages(known.bytes_per_s, page_bytes, self.end, SEGMENT_PAGES, known.round_trip_s)
            # As fast as each other while that is not known.
            share, fewest = 0.5, 0.0
            if known.bytes_per_s is not None:
                fetch_s = page_bytes / max(known.bytes_per_s, 1e-9)
                fewest = max(MIN_BLOCK_S, ROUND_TRIPS_OF_A_BLOCK * known.round_trip_s) / fetch_s
                if known.prefill is not None:
                    page_tokens = self.prefix.page_tokens
                    before = self.prefix.tokens_before + low * page_tokens
                    compute_s = known.prefill.seconds((high - low) * page_tokens, before) / (high - low)
                    restore_s = page_bytes * known.restore.byte_s / known.restore.threads if known.restore else 0.0
                    share = compute_s / (compute_s + max(fetch_s, restore_s))
            left = (high - low) * share
            pages = min(most, round(left / 2) if left / 2 > fewest else round(left), high - low)
            if is_doubted:
                # Or nobody would know that it was a pause.
                pages = max(1, pages)
            if pages < 1:
                return None
            self._low = high - pages
            return self._low, high

    def _as_doubted(self, known: Knowledge) -> tuple[Knowledge, bool]:
        """What is known, and whether no block has come since the link was doubted."""
        doubted = self._doubted_bytes_per_s
        if doubted is None or self._blocks:
            return known, False
        bytes_per_s = doubted if known.bytes_per_s is None else min(doubted, known.bytes_per_s)
        return dataclasses.replace(known, bytes_per_s=bytes_per_s), True

    def shorten(self, first: int) -> None:
        """The block that was last given begins with this page instead."""
        with self._lock:
            self._low = first

    def landed(self, first: int, pages: Sequence[PageObject]) -> None:
        """The last block is there: its restore begins, or will with :meth:`begin`."""
        with self._lock:
            pages = pages[: max(0, self.end - first)]
            if self._is_over or not pages:
                return
            block = _Block(first, pages)
            self._blocks.append(block)
            self._landed = first
            self._low = min(self._low, first)
            self._start(block)

    # ---- the scheduler's thread ----

    def agree(self, first_page: int, end: int, pass_tokens: int, head_pages: int = 0) -> None:
        """What all ranks have planned is taken together; before :meth:`begin`.

        Args:
            first_page: the largest of theirs.
            end: the smallest.
            pass_tokens: the smallest.
            head_pages: the largest; fewer may be there on all ranks.
        """
        with self._lock:
            self.first_page, self.pass_tokens, self.head_pages = first_page, pass_tokens, head_pages
            self.end = end
            self._low = min(self._low, end)
            self._landed = min(self._landed, end)
            for block in self._blocks:
                block.pages = block.pages[: max(0, end - block.first)]
            self._blocks = [block for block in self._blocks if block.pages]

    def begin(self, slots: torch.Tensor, first: int, start_restore: StartRestore) -> None:
        """The request is being computed, and what has landed is restored.

        Args:
            slots: int64, of the pages from ``first`` to the end, on the pool's device; the tail's until it
                :attr:`is_idle` after it was closed.
            first: index of the first page that has slots.
            start_restore: starts one.
        """
        with self._lock:
            self._slots, self._slots_first, self._start_restore = slots, first, start_restore
            self._front = max(self._front, first)
            for block in self._blocks:
                self._start(block)

    def _start(self, block: _Block) -> None:
        """Starts its restore, under the lock; the restorer's threads call back without it being held by this one."""
        if self._slots is None or self._start_restore is None or block.restore is not None or self._has_failed:
            return
        if block.first < self._slots_first:
            cut = self._slots_first - block.first
            if cut >= len(block.pages):
                return
            block.first, block.pages = self._slots_first, block.pages[cut:]
        tokens = self.prefix.page_tokens
        start = (block.first - self._slots_first) * tokens
        job = RestoreJob(block.pages, self._slots[start : start + len(block.pages) * tokens])
        block.runs = True
        events: list[DeviceEvent] = []
        groups_left = [len(block.pages[0].header.group_ranges)]

        def on_layers(group: LayerGroup, of_group: Sequence[DeviceEvent]) -> None:
            events.extend(of_group)
            groups_left[0] -= 1
            if groups_left[0] == 0:
                # One assignment: no lock is needed, and the one who holds it may be waiting for this thread.
                block.events = events
                block.runs = False

        def on_failure(error: KVCodecError) -> None:
            self._has_failed = True
            block.runs = False

        block.restore = self._start_restore([job], on_layers, on_failure)

    def computing(self, until_page: int) -> None:
        """A pass was launched that computes up to this page."""
        with self._lock:
            self._front = max(self._front, until_page)
            if self._front >= self._landed:
                # What is under way has been overtaken.
                self.stop.set()

    def outlook(self) -> Outlook:
        """How far it is."""
        with self._lock:
            restored = self.end
            for block in self._blocks:
                if block.events is None or not all(event.query() for event in block.events):
                    break
                restored = block.first
            if self._has_failed or self._is_over or self._slots is None:
                return Outlook(self.end, self.end)
            # What is on its way over a link that has failed may not come.
            coming = restored if self._doubted_bytes_per_s is not None and not self._blocks else self._low
            ahead = [page for page in (coming, restored) if page > self._front and self._is_worth_a_stop(page)]
            return Outlook(restored, min(ahead, default=self.end))

    def _is_worth_a_stop(self, page: int) -> bool:
        """Whether computing no further than to this page takes less than computing all, with one more pass perhaps."""
        if self._prefill is None:
            return True
        passes = dataclasses.replace(self._prefill, pass_tokens=self.pass_tokens)
        here, there, end = (
            self.prefix.tokens_before + index * self.prefix.page_tokens for index in (self._front, page, self.end)
        )
        last_s = passes.seconds(max(1, self.prefix.prompt_tokens - end), end)
        stopping_s = passes.seconds(there - here, here) + last_s
        return stopping_s < passes.seconds(max(1, self.prefix.prompt_tokens - here), here)

    def take(self, page: int) -> torch.Tensor:
        """The slots from this page to the end, which the request owns from now on; the tail is over."""
        with self._lock:
            assert self._slots is not None
            cut = (page - self._slots_first) * self.prefix.page_tokens
            taken, self._slots = self._slots[cut:], self._slots[:cut]
            self.joined_pages = self.end - page
            self._is_over = True
            self.stop.set()
            return taken

    def pages_from(self, page: int) -> list[PageObject]:
        """The restored pages from this one to the end, in prefix order."""
        with self._lock:
            blocks = sorted(self._blocks, key=lambda block: block.first)
            every = [(block.first + index, entry) for block in blocks for index, entry in enumerate(block.pages)]
            return [entry for index, entry in every if index >= page]

    def close(self) -> None:
        """Nothing more is restored, and what is under way ends."""
        with self._lock:
            self._is_over = True
            self.stop.set()

    @property
    def is_idle(self) -> bool:
        """Whether no slot of it is written any more."""
        with self._lock:
            return not any(
                block.runs or (block.events is not None and not all(event.query() for event in block.events))
                for block in self._blocks
            )

    def leftover(self) -> torch.Tensor | None:
        """The slots that nobody took, once it :attr:`is_idle`; None if there are none."""
        with self._lock:
            slots, self._slots = self._slots, None
            return slots if slots is not None and slots.numel() else None

    @property
    def bad_pages(self) -> list[PageObject]:
        """Pages that could not be restored."""
        with self._lock:
            return [page for block in self._blocks if block.restore is not None for page in block.restore.bad_pages]

    def wait(self) -> None:
        """Waits until it :attr:`is_idle`; for the end of a server or the flush of a cache."""
        pause: Any = threading.Event()
        while not self.is_idle:
            pause.wait(0.005)
