"""Pages of the pool that are handed over for publishing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """A namespace that pages are published in.

    Attributes:
        namespace_digest: the namespace.
        pages: indices of the pages of an offload that it is to get.
    """

    namespace_digest: bytes
    pages: Sequence[int]


class Offload:
    """Pages handed over for publishing."""

    def __init__(
        self,
        targets: Sequence[Target],
        page_hashes: Sequence[bytes],
        slots: torch.Tensor,
        after: Sequence[Any] = (),
        page_bytes: Sequence[int] = (),
        first_position: int = 0,
    ) -> None:
        """An offload that is not settled yet; the arguments are those of ``Publisher.offload``.

        ``page_bytes`` is what a page has reserved of the queue for each target.
        """
        self.targets = targets
        self.page_hashes = page_hashes
        self.slots = slots
        self.after = after
        self.page_bytes = page_bytes
        self.first_position = first_position
        self.succeeded: bool | None = None
        """Whether the pages were taken over; None as long as their slots may still be read."""
        self._settled = threading.Event()

    @property
    def reserved_bytes(self) -> int:
        """Of the queue, by all its pages."""
        return sum(size * len(target.pages) for size, target in zip(self.page_bytes, self.targets, strict=True))

    def settle(self, succeeded: bool) -> None:
        """The slots are free again."""
        self.succeeded = succeeded
        self._settled.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the slots are free again; False if they are not after ``timeout_s``."""
        return self._settled.wait(timeout_s)
