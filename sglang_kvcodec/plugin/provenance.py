"""Which pages in the pool were restored, and from which tier: pages are not published in a better one than that."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from sglang_kvcodec.flow.publisher import Target
from sglang_kvcodec.flow.stored_prefix import Tier

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
        self._tiers: collections.OrderedDict[bytes, int] = collections.OrderedDict()

    def restored(self, page_hash: bytes, namespace_digest: bytes, tiers: Sequence[Tier]) -> None:
        """A page goes into the pool."""
        tier = next((i for i, tier in enumerate(tiers) if namespace_digest in tier.namespace_digests), len(tiers) - 1)
        self._tiers[page_hash] = tier
        self._tiers.move_to_end(page_hash)
        if len(self._tiers) > MAX_PAGES:
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
            worst = max(worst, self._tier(page_hash) or 0)
        pages: list[list[int]] = [[] for _ in tiers]
        for index, page_hash in enumerate(page_hashes):
            own = self._tier(page_hash)
            if own is not None:
                worst = max(worst, own)
                if own < len(tiers):
                    pages[own].append(index)
                continue
            for tier in range(worst, len(tiers)):
                pages[tier].append(index)
        return [
            Target(tier.namespace_digests[0], indices) for tier, indices in zip(tiers, pages, strict=True) if indices
        ]

    def _tier(self, page_hash: bytes) -> int | None:
        tier = self._tiers.get(page_hash)
        if tier is not None:
            self._tiers.move_to_end(page_hash)
        return tier

    def clear(self) -> None:
        """The pool is empty."""
        self._tiers.clear()
