"""The requests that wait for their pages, and how many pages all ranks agree that each of them gets.

All ranks of a server hold the same requests in the same order, and each plans for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, ItemsView, Sequence, Set
from typing import TYPE_CHECKING, Any

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.fetch_ticket import FetchTicket
from sglang_kvcodec.flow.news import News
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.plugin.pipeline import NOT_YET, Fetch, PipelineAgreement
from sglang_kvcodec.plugin.tails import TailBook

if TYPE_CHECKING:
    from sglang_kvcodec.plugin.ahead import AheadBook

TAIL_NUMBERS = 4
"""Of a rank's row, those that :class:`TailBook` offers."""


@dataclasses.dataclass
class HeldRequest:
    """A request that waits for its pages.

    Attributes:
        ticket: the fetch.
        start_page: index in the prompt of the first page asked for.
        hashes: of those pages.
        number: of the request, the same at all stages of a pipeline.
        kept: the first of those pages, as far as they are in host memory; the fetch is of the others. In a pipeline
            only: elsewhere SGLang asks for them when it looks a prompt up.
        agreed_pages: how many of them every rank has; None until all ranks are done.
        follows: whether it waits for another request instead of a fetch.
        key: SGLang's, of all pages of the prompt; None where nothing of it is restored before it is in a batch.
        before: the pages before ``start_page``, by their hashes.
        device_pages: how many of those are on the device; the others are in host memory.
        ahead_pages: how many of them every rank has, where the request waits until they are restored.
    """

    ticket: FetchTicket
    start_page: int
    hashes: tuple[bytes, ...]
    number: int
    kept: tuple[PageObject, ...] = ()
    agreed_pages: int | None = None
    follows: bool = False
    key: Any = None
    before: tuple[bytes, ...] = ()
    device_pages: int = 0
    ahead_pages: int | None = None

    @property
    def is_fetched(self) -> bool:
        """Whether it waits for its own fetch."""
        return self.agreed_pages is None and self.ahead_pages is None and not self.follows

    @property
    def pages(self) -> list[PageObject]:
        """Those that are here or on their way."""
        return [*self.kept, *self.ticket.pages]


class HeldRequests:
    """Those of one rank. Runs on the scheduler's thread; requests are SGLang's ``Req``."""

    def __init__(self) -> None:
        """None."""
        self._held: dict[Any, HeldRequest] = {}
        self._waiting_rids: set[str] = set()
        self._next_number = 0
        self._news_count = -1

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, request: Any) -> bool:
        return request in self._held

    def get(self, request: Any) -> HeldRequest | None:
        """Of a request; None if it is not held."""
        return self._held.get(request)

    @property
    def waiting_rids(self) -> Set[str]:
        """Ids of those whose pages were not agreed on."""
        return self._waiting_rids

    def hold(
        self,
        request: Any,
        ticket: FetchTicket,
        start_page: int,
        hashes: tuple[bytes, ...],
        kept: tuple[PageObject, ...] = (),
        follows: bool = False,
        key: Any = None,
        before: tuple[bytes, ...] = (),
        device_pages: int = 0,
    ) -> None:
        """A request waits from now on; see :class:`HeldRequest`."""
        self._held[request] = HeldRequest(
            ticket,
            start_page,
            hashes,
            self._next_number,
            kept,
            follows=follows,
            key=key,
            before=before,
            device_pages=device_pages,
        )
        self._next_number += 1
        self._waiting_rids.add(request.rid)
        self._count_waiting()
        # The fetch may have come to its end before this knows of it.
        self._news_count = -1

    def let_go(self, request: Any) -> HeldRequest | None:
        """A request waits no longer; None if it did not."""
        held = self._held.pop(request, None)
        if held is not None:
            self._waits_no_longer(request.rid)
        return held

    def clear(self) -> None:
        """Lets go of all, and gives their fetches up."""
        for held in self._held.values():
            held.ticket.cancel()
        self._held.clear()
        self._waiting_rids.clear()
        self._count_waiting()

    def pages_of(self, rid: str) -> dict[bytes, PageObject]:
        """The pages agreed on for a request, by their hashes; none if it is not held or must wait."""
        for request, held in self._held.items():
            if request.rid == rid and held.agreed_pages:
                return dict(zip(held.hashes, held.pages[: held.agreed_pages], strict=False))
        return {}

    def has_news(self, news: News) -> bool:
        """Whether any fetch has come to its end since this was last asked; many may wait, for many passes."""
        count = news.count
        is_new, self._news_count = count != self._news_count, count
        return is_new

    def agree(self, smallest_of_ranks: Callable[[Sequence[int]], list[int]], tails: TailBook, ahead: AheadBook) -> None:
        """Agrees with the ranks of the same stage on the fetches that are over at all of them.

        Args:
            smallest_of_ranks: number by number, the smallest of what the ranks give at once.
            tails: told of what is fetched while the beginning is computed.
            ahead: told of what could be restored before a request is in a batch.
        """
        waiting = self._waiting()
        if not waiting:
            return
        offers = ahead.offers([held for _, held in waiting])
        rows = [[*_row(held.ticket), *offered] for (_, held), offered in zip(waiting, offers, strict=True)]
        smallest = iter(smallest_of_ranks([number for row in rows for number in row]))
        for (request, held), row in zip(waiting, rows, strict=True):
            pages, most_pages, *offer = (next(smallest) for _ in row)
            if pages >= 0:
                if ahead.agreed(request, held, pages, offer[TAIL_NUMBERS:]):
                    held.ahead_pages = pages
                    continue
                self._settle(request, held, pages)
                tails.agreed(request.rid, held.ticket, held.start_page, offer[:TAIL_NUMBERS])
            elif most_pages == 0:
                # A rank will have none, so the others need not wait for theirs.
                self._settle(request, held, 0)
                held.ticket.cancel()

    def restored(self, request: Any) -> None:
        """The pages for which a request has waited are where it will find them."""
        held = self._held[request]
        assert held.ahead_pages is not None
        self._settle(request, held, held.ahead_pages)

    def agree_in_pipeline(
        self, pipeline: PipelineAgreement, first_offload: int, offloads: Sequence[bool]
    ) -> list[bool]:
        """Agrees with the other stages as well, and also on the offloads that are over at all of them.

        Args:
            pipeline: with those.
            first_offload: how many offloads were agreed on before.
            offloads: whether those that come next, and are over here, have succeeded.

        Returns:
            Of the next offloads that are over everywhere, whether they have succeeded everywhere.
        """
        waiting = self._waiting()
        fetches = []
        for _, held in waiting:
            ticket, kept = held.ticket, len(held.kept)
            pages = kept + len(ticket.pages) if ticket.is_ready else NOT_YET
            fetches.append(Fetch(held.number, pages, kept + ticket.most_pages))
        agreed, successes = pipeline.agree(fetches, first_offload, offloads)
        for (request, held), pages in zip(waiting, agreed, strict=True):
            if pages == NOT_YET:
                continue
            self._settle(request, held, pages)
            if not held.ticket.is_ready:
                held.ticket.cancel()
        return successes

    def _waiting(self) -> Sequence[tuple[Any, HeldRequest]]:
        held: ItemsView[Any, HeldRequest] = self._held.items()
        return [(request, each) for request, each in held if each.is_fetched]

    def _settle(self, request: Any, held: HeldRequest, pages: int) -> None:
        held.agreed_pages = pages
        self._waits_no_longer(request.rid)

    def _waits_no_longer(self, rid: str) -> None:
        self._waiting_rids.discard(rid)
        self._count_waiting()

    def _count_waiting(self) -> None:
        metrics.HELD_REQUESTS.set(len(self._waiting_rids))


def _row(ticket: FetchTicket) -> list[int]:
    """What one rank can say of a fetch; of each number the smallest of all ranks counts."""
    pages = len(ticket.pages) if ticket.is_ready else -1
    return [pages, ticket.most_pages, *TailBook.offer(ticket)]
