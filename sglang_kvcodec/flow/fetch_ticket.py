"""One request's fetch, as those who wait for it see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from sglang_kvcodec.flow.planner import FetchPlan
from sglang_kvcodec.flow.tail import Tail
from sglang_kvcodec.format.page_object import PageObject


class FetchTicket:
    """One request's fetch. Its fields may be read by any thread once :attr:`is_ready`."""

    def __init__(
        self,
        page_hashes: Sequence[bytes],
        tokens_before: int = 0,
        prompt_tokens: int = 0,
        rid: str = "",
        may_compute: bool = False,
    ) -> None:
        """A fetch of ``page_hashes``, in prefix order, for a prompt with so many tokens before them and in all."""
        self.rid = rid
        self.may_compute = may_compute
        """Whether the model is free to compute the start of the prefix meanwhile."""
        self.tail: Tail | None = None
        """The end of the prefix, where that is what it does; set before the ticket is ready. There are :attr:`pages` as
        well if it was turned round in the middle."""
        self.second: FetchTicket | None = None
        """For the second start of a request whose pages were promised and do not come; set as soon as that is known."""
        self.page_hashes = tuple(page_hashes)
        self.tokens_before = tokens_before
        self.prompt_tokens = prompt_tokens
        self.start_s = time.monotonic()
        self.pages: list[PageObject] = []
        """The pages that can be restored: an unbroken prefix of ``page_hashes``. All of it has arrived or, in a ticket
        that is ready before it is done, will. Held as long as the ticket is."""
        self.stored_pages = len(self.page_hashes)
        """How long a prefix the peer has; that it has all is the guess until it was asked."""
        self.plan: FetchPlan | None = None
        """What was planned, once it was."""
        self.cut_phase = ""
        """The phase in which computing overtook the fetch, if it did."""
        self.stop = threading.Event()
        """Ends the transfer."""
        self._is_settled = False
        self._is_measuring = False
        self._is_promised = False
        self._is_kept = False
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done.is_set()

    @property
    def is_ready(self) -> bool:
        """Whether :attr:`pages` are final: nothing more will arrive, or what is under way will be in time."""
        return self._is_promised or self.is_done

    @property
    def is_promised(self) -> bool:
        """Whether it was ready before it was done."""
        return self._is_promised

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def was_cut(self) -> bool:
        """Whether computing has overtaken it."""
        return bool(self.cut_phase)

    def has_gone_on(self) -> bool:
        """Whether the request has gone on without it, while it still learns."""
        return self._is_measuring

    @property
    def most_pages(self) -> int:
        """More than these will not come."""
        if self.tail is not None:
            return self.tail.end
        if self.is_ready:
            return len(self.pages)
        plan = self.plan
        return len(self.page_hashes) if plan is None else plan.pages

    def again(self, tail: Tail | None) -> FetchTicket:
        """For the second start of the same request: nothing to wait for, and a tail if there is one."""
        ticket = FetchTicket(self.page_hashes, self.tokens_before, self.prompt_tokens, self.rid)
        ticket.tail, ticket.stored_pages = tail, self.stored_pages
        ticket.settle(())
        ticket.finish()
        return ticket

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled.set()
        if (tail := self.tail) is not None:
            tail.close()
        if (second := self.second) is not None:
            second.cancel()
        with self._lock:
            if not self._is_measuring:
                self.stop.set()

    @property
    def is_kept(self) -> bool:
        """Whether all that was promised has arrived."""
        return self._is_kept

    def admitted(self) -> None:
        """The request is in a batch: it waits no more for the fetch, but for pages that were promised.

        A tail goes on while the request is computed.
        """
        if not self._is_promised and self.tail is None:
            self.cancel()

    def promise(self, pages: Sequence[PageObject]) -> bool:
        """What has not arrived of ``pages`` will be there in time. Whether that was news to those who wait."""
        with self._lock:
            if self._is_settled or self._is_promised or self.is_cancelled or self.cut_phase:
                return False
            self.pages = list(pages)
            self._is_promised = True
            return True

    def cut(self, phase: str) -> None:
        """Computing is faster: ends the transfer with what has arrived whole."""
        self.cut_phase = phase
        self.stop.set()

    def abandon(self, phase: str) -> bool:
        """Computing is faster, and nothing has arrived: as :meth:`settle` without a page.

        What is under way may go on, to learn how slow it is.
        """
        with self._lock:
            if self._is_settled or self._is_promised:
                return False
            self.cut_phase = phase
            self._is_settled = self._is_measuring = True
            return True

    def settle(self, pages: Sequence[PageObject]) -> bool:
        """Nothing more will arrive but ``pages``. Whether that was not settled before; then :meth:`finish` follows.

        What was promised stays so: whoever waits for the rest of it hears from the pages.
        """
        with self._lock:
            if self._is_settled:
                return False
            if self._is_promised:
                self._is_kept = len(pages) == len(self.pages)
            else:
                self.pages = list(pages)
            self._is_settled = True
            return True

    def finish(self) -> None:
        """Lets others read it."""
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Waits for :attr:`is_done`; for tests."""
        return self._done.wait(timeout_s)
