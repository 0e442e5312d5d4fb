"""What an SGLang server and a storage peer say to each other, free of any transport."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class LookupResult:
    """Which of the asked pages are stored.

    Attributes:
        covered_pages: length of the longest stored prefix of the list.
        present: for each page, whether it is stored.
        covered_bytes: object bytes of the covered prefix.
    """

    covered_pages: int
    present: tuple[bool, ...]
    covered_bytes: int


@dataclasses.dataclass(frozen=True)
class FetchedHeader:
    """First event of each page: the object's bytes up to its payload."""

    page_index: int
    object_bytes: int
    header: bytes


@dataclasses.dataclass(frozen=True)
class FetchedFragment:
    """Bytes of a page object at ``offset`` from its start.

    ``data`` may be a view of the whole message it came in, so it is to be copied rather than kept.
    """

    page_index: int
    offset: int
    data: bytes | memoryview


@dataclasses.dataclass(frozen=True)
class FetchedMissing:
    """The page is no longer stored."""

    page_index: int


FetchEvent = FetchedHeader | FetchedFragment | FetchedMissing


class PutOutcome(enum.Enum):
    """What became of one object."""

    STORED = "stored"
    ALREADY_STORED = "already_stored"
    REJECTED = "rejected"
    NO_CAPACITY = "no_capacity"


@dataclasses.dataclass(frozen=True)
class PutResult:
    """What became of one object, with the peer's words for it."""

    outcome: PutOutcome
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class PeerStat:
    """A peer's own account of itself."""

    objects: int
    stored_bytes: int
    capacity_bytes: int
    evicted_objects: int
    engine: str
    format_version: int
    software_version: str


@dataclasses.dataclass(frozen=True)
class CalibrationEntry:
    """A calibration artifact that is stored.

    Attributes:
        model_digest: 32 bytes that name the model, shard and KV layout it is for.
        digest: SHA-256 of the artifact, its name.
        size_bytes: of the artifact.
        stored_at_ms: when it was last put, in milliseconds of Unix time.
        is_current: whether it is the one that a server of that model gets.
    """

    model_digest: bytes
    digest: bytes
    size_bytes: int
    stored_at_ms: int
    is_current: bool


Progress = Callable[[int, int], None]
"""Called with the bytes that have been transferred, and the bytes of all; maybe in another thread."""


class PeerTransport(Protocol):
    """A storage peer as an SGLang server sees it. Thread-safe; every call blocks, so none is for a scheduler's thread.

    Every method raises ``PeerUnavailableError``, ``PeerTimeoutError`` or ``PeerRejectedError``, and nothing else, for
    what goes wrong on the way.
    """

    def lookup(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> LookupResult:
        """Which of the pages are stored."""
        ...

    def fetch(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], cancelled: threading.Event | None = None
    ) -> Generator[FetchEvent, None, None]:
        """The pages, headers first, then payload layer group by layer group; ends early once ``cancelled`` is set.

        Closing the generator ends the call.
        """
        ...

    def put(self, namespace_digest: bytes, objects: Sequence[tuple[bytes, bytes]]) -> list[PutResult]:
        """Stores ``(page_hash, object)`` pairs; one result each."""
        ...

    def delete(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> int:
        """Deletes pages; how many there were."""
        ...

    def stat(self) -> PeerStat:
        """The peer's account of itself."""
        ...

    def put_calibration(self, model_digest: bytes, artifact: bytes, progress: Progress | None = None) -> bytes:
        """Stores a calibration artifact, which becomes its model's current one; its SHA-256.

        Raises:
            PeerRejectedError: it is empty, larger than ``config.MAX_ARTIFACT_BYTES``, or the peer has no room for it.
        """
        ...

    def get_calibration(
        self, model_digest: bytes, digest: bytes | None = None, progress: Progress | None = None
    ) -> bytes | None:
        """A model's calibration artifact, the current one unless ``digest`` names another; None if there is none.

        Its bytes have the digest that was asked for or announced, and are at most ``config.MAX_ARTIFACT_BYTES``.

        Raises:
            PeerRejectedError: what came is not what was announced.
        """
        ...

    def list_calibrations(self) -> list[CalibrationEntry]:
        """All calibration artifacts of the peer, of all models."""
        ...

    def delete_calibration(self, model_digest: bytes, digest: bytes) -> bool:
        """Deletes a calibration artifact; whether it was there. Pages coded with it can't be read without it."""
        ...

    def close(self) -> None:
        """Ends every call under way with ``PeerUnavailableError``."""
        ...
