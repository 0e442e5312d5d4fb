"""Where each page of one fetch comes from: a tier that was planned, and another one if the link makes it worth it."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvcodec.flow.blocks import block_pages, next_block
from sglang_kvcodec.flow.stored_prefix import StoredPrefix


class Course:
    """The namespace and the size of every page of a fetch. For one thread."""

    def __init__(self, prefixes: Sequence[StoredPrefix], choice: int, pages: int, overlap_s: float = 0.0) -> None:
        """The course that was planned.

        Args:
            prefixes: what could be fetched.
            choice: which of them is.
            pages: how many of it.
            overlap_s: of the plan.
        """
        self.prefixes = prefixes
        self.choice = choice
        self.namespaces = prefixes[choice].namespaces[:pages]
        self.page_bytes = prefixes[choice].page_bytes[:pages]
        self.last_block_bytes: int | None = None
        """Of the block that was asked for last, if no other comes after it."""
        self._overlap_s = overlap_s
        self._restart: int | None = None

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.namespaces)

    @property
    def has_choice(self) -> bool:
        """Whether there is another tier to go on with."""
        return len(self.prefixes) > 1

    def rest_bytes(self, choice: int, first: int) -> list[int]:
        """The sizes of the pages from ``first`` on, in the tier that is chosen where it is stored."""
        chosen = self.prefixes[choice].page_bytes[first : self.pages]
        return chosen + self.page_bytes[first + len(chosen) :]

    def switch(self, choice: int, first: int) -> None:
        """Goes on with another tier from page ``first`` on; what is under way of it is asked for again."""
        self.choice = choice
        prefix = self.prefixes[choice]
        end = min(prefix.pages, self.pages)
        if end > first:
            self.namespaces[first:end] = prefix.namespaces[first:end]
            self.page_bytes[first:end] = prefix.page_bytes[first:end]
        self._restart = first
        self.last_block_bytes = None

    def take_restart(self) -> int | None:
        """The page to go on with after a switch, once; None where there was none."""
        first, self._restart = self._restart, None
        return first

    def block(self, first: int, bytes_per_s: float | None, segment_pages: int, round_trip_s: float) -> int:
        """Pages to ask for next, from ``first`` on: of one namespace, and of about equal size.

        Args:
            first: index of the first.
            bytes_per_s: of the link, None while that is not known.
            segment_pages: pages that are decoded in one call.
            round_trip_s: of the peer.
        """
        end = first
        while end < self.pages and self.namespaces[end] == self.namespaces[first]:
            end += 1
        mean_bytes = sum(self.page_bytes[first:end]) / (end - first)
        block = block_pages(bytes_per_s, mean_bytes, self.pages, segment_pages, round_trip_s)
        overlap_bytes = self._overlap_s * bytes_per_s if bytes_per_s is not None else 0.0
        pages = next_block(end - first, block, overlap_bytes / max(1.0, mean_bytes))
        is_last = first + pages == self.pages
        self.last_block_bytes = sum(self.page_bytes[first:]) if is_last else None
        return pages
