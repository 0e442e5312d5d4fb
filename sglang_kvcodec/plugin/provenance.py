"""Which pages in the pool were restored, and from which tier: pages are not published in a better one than that."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from sglang_kvcodec.flow.offload import Target
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.namespace import PageKey

MAX_PAGES = 1 << 18


class Provenance:
    """Of the pages of several lossy tiers, which are stored side by side.

    A page that was restored is worth what its tier is; and so is one that was computed after it, for its K and V are
    made of what the model saw there. In a better tier it would break the promise to servers that read no other.
    The oldest of :data:`MAX_PAGES` is forgotten: a page of a small tier that stayed in the pool for as long could be
    published in a better one.
    """

    def __init__(self) -> None:
        """No page was restored yet."""
        self._tiers: collections.OrderedDict[bytes, tuple[int, int]] = collections.OrderedDict()
        """Page hash -> its tier, and the worst that is in what is computed after it."""

    def restored(
        self,
        pages: Sequence[PageKey],
        tiers: Sequence[Tier],
        worst_of_ranks: Callable[[int], int] = lambda worst: worst,
    ) -> None:
        """Pages go into the pool.

        Args:
            pages: of one request, where they were stored.
            tiers: those there are, the best first.
            worst_of_ranks: the largest of what the ranks give it, which they do at the same time: each has planned for
                itself, and what is computed next is made of all of them.
        """
        of = {digest: index for index, tier in enumerate(tiers) for digest in tier.namespace_digests}
        own = [of.get(page.namespace_digest, len(tiers) - 1) for page in pages]
        worst = worst_of_ranks(max(own, default=0))
        for page, tier in zip(pages, own, strict=True):
            self._tiers[page.page_hash] = tier, worst
            self._tiers.move_to_end(page.page_hash)
        while len(self._tiers) > MAX_PAGES:
            self._tiers.popitem(last=False)

    def targets(self, before: Sequence[bytes], page_hashes: Sequence[bytes], tiers: Sequence[Tier]) -> list[Target]:
        """Where pages may be published.

        Args:
            before: hashes of the pages before them in their prompt.
            page_hashes: of the pages, which follow each other.
            tiers: those there are, the best first.

        Returns:
            A target for each tier that gets any: a restored page only in its own, a computed one in those that are no
            better than what it was computed after.
        """
        worst = 0
        for page_hash in before:
            worst = max(worst, self._tier(page_hash)[1])
        pages: list[list[int]] = [[] for _ in tiers]
        for index, page_hash in enumerate(page_hashes):
            own, after = self._tier(page_hash)
            worst = max(worst, after)
            if own is not None:
                if own < len(tiers):
                    pages[own].append(index)
                continue
            for tier in range(worst, len(tiers)):
                pages[tier].append(index)
        return [
            Target(tier.namespace_digests[0], indices) for tier, indices in zip(tiers, pages, strict=True) if indices
        ]

    def _tier(self, page_hash: bytes) -> tuple[int | None, int]:
        if page_hash not in self._tiers:
            return None, 0
        self._tiers.move_to_end(page_hash)
        return self._tiers[page_hash]

    def clear(self) -> None:
        """The pool is empty."""
        self._tiers.clear()
