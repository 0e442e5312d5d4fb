"""Requests that wait for another one whose prefix is on its way already: what is in flight is fetched once.

The one that came first leads. When its prompt has been computed, what it fetched is in the tree, and the others find it
there as any request does: nothing is fetched, decoded or restored twice. All that decides is the same on all ranks, so
they need not agree on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class _Leader:
    """A request that fetches.

    Attributes:
        rid: its id.
        hashes: of the pages it lacked when it came, in prefix order.
        followers: those that wait for it, as SGLang's cache calls them.
    """

    rid: str
    hashes: tuple[bytes, ...]
    followers: list[Any] = dataclasses.field(default_factory=list)

    @property
    def middle(self) -> int:
        """Index of the page that who follows has to share: half of what is fetched is then its own, too."""
        return (len(self.hashes) - 1) // 2


class Following:
    """Those of one rank. Runs on the scheduler's thread."""

    def __init__(self) -> None:
        """Nobody leads."""
        self._leaders: dict[str, _Leader] = {}
        self._by_middle: dict[bytes, _Leader] = {}

    def __bool__(self) -> bool:
        return bool(self._leaders)

    @property
    def leaders(self) -> Sequence[str]:
        """Ids of the requests for which others may wait."""
        return tuple(self._leaders)

    def leader_of(self, hashes: Sequence[bytes]) -> str | None:
        """Whom to wait for with these pages: who fetches half of them at least, and hardly anything else.

        Page hashes are chained, so two prefixes that share a page share all before it.
        """
        if not self._by_middle:
            return None
        for index, page_hash in enumerate(hashes):
            leader = self._by_middle.get(page_hash)
            if leader is None:
                continue
            after = zip(hashes[index + 1 :], leader.hashes[leader.middle + 1 :], strict=False)
            common = (
                1
                + min(index, leader.middle)
                + next(
                    (count for count, (mine, other) in enumerate(after) if mine != other),
                    min(len(hashes) - index, len(leader.hashes) - leader.middle) - 1,
                )
            )
            return leader.rid if 2 * common >= len(hashes) else None
        return None

    def lead(self, rid: str, hashes: Sequence[bytes]) -> None:
        """A request fetches these pages; others may wait for it from now on."""
        leader = _Leader(rid, tuple(hashes))
        if (
            rid not in self._leaders
            and leader.hashes
            and self._by_middle.setdefault(leader.hashes[leader.middle], leader) is leader
        ):
            self._leaders[rid] = leader

    def follow(self, leader_rid: str, request: Any) -> None:
        """A request waits until :meth:`over` gives it back."""
        self._leaders[leader_rid].followers.append(request)

    def over(self, rid: str) -> list[Any]:
        """A request has been computed, or is gone: nobody waits for it any more. Who has, in the order they came."""
        leader = self._leaders.pop(rid, None)
        if leader is None:
            return []
        del self._by_middle[leader.hashes[leader.middle]]
        return leader.followers

    def clear(self) -> None:
        """Nobody leads any more."""
        self._leaders.clear()
        self._by_middle.clear()
