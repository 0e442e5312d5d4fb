"""Which calibration artifacts a store has, which are current, and what they and those on their way take."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.format.exchange import CalibrationEntry
from sglang_kvcodec.storage.artifacts import MAX_ARTIFACTS, ArtifactStat


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArtifact:
    """One put of an artifact. Equal only to itself, so that what was put anew is not taken for what it replaced."""

    model_digest: bytes
    digest: bytes
    size_bytes: int
    stored_at_ms: int


class Reservation:
    """The place of one artifact that is to come; made by an index, and its to change."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.held_artifacts = 0


class ArtifactIndex:
    """The account of one store, in memory. Thread-safe; holds its lock for moments only."""

    def __init__(self, capacity_bytes: int, stored: Iterable[StoredArtifact] = ()) -> None:
        """Starts with what is ``stored``, of each model the current one last; the capacity may be exceeded by it."""
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        # By model, then by digest, put last at the end.
        self._models: dict[bytes, dict[bytes, StoredArtifact]] = {}
        self._stored_bytes = 0
        self._artifacts = 0
        self._reserved_bytes = 0
        self._reserved_artifacts = 0
        self._closed = False
        for artifact in stored:
            self._insert(artifact)

    def find(self, model_digest: bytes, digest: bytes | None = None) -> StoredArtifact | None:
        """A model's artifact, the current one by default.

        Raises:
            StorageUnavailableError: closed; so do the other methods.
        """
        with self._lock:
            self._require_open()
            of_model = self._models.get(model_digest)
            if not of_model:
                return None
            return next(reversed(of_model.values())) if digest is None else of_model.get(digest)

    def entries(self) -> list[CalibrationEntry]:
        """All artifacts, by model digest, then in the order they were put."""
        with self._lock:
            self._require_open()
            return [
                CalibrationEntry(a.model_digest, a.digest, a.size_bytes, a.stored_at_ms, a is current)
                for _, of_model in sorted(self._models.items())
                for current in [next(reversed(of_model.values()))]
                for a in of_model.values()
            ]

    def stat(self) -> ArtifactStat:
        """Counts now."""
        with self._lock:
            self._require_open()
            return ArtifactStat(self._artifacts, self._stored_bytes, self._capacity_bytes)

    def reserve(self, place: Reservation, model_digest: bytes, digest: bytes, size_bytes: int) -> None:
        """Makes ``place`` large enough for an artifact, by what is stored now. What it would replace makes room.

        Raises:
            CapacityError: there is no room; ``place`` is empty.
        """
        with self._lock:
            self._release(place)
            self._require_open()
            replaced = self._models.get(model_digest, {}).get(digest)
            more_bytes = max(0, size_bytes - replaced.size_bytes) if replaced else size_bytes
            taken_bytes = self._stored_bytes + self._reserved_bytes
            if more_bytes and taken_bytes + more_bytes > self._capacity_bytes:
                raise CapacityError(
                    f"no room for a calibration of {size_bytes} bytes: {taken_bytes} of {self._capacity_bytes} are"
                    " taken, and calibrations are never evicted; delete some"
                )
            if not replaced and self._artifacts + self._reserved_artifacts >= MAX_ARTIFACTS:
                raise CapacityError(f"there are {MAX_ARTIFACTS} calibrations already; delete some")
            place.held_bytes = more_bytes
            place.held_artifacts = 0 if replaced else 1
            self._reserved_bytes += place.held_bytes
            self._reserved_artifacts += place.held_artifacts

    def release(self, place: Reservation) -> None:
        """Gives back what ``place`` holds."""
        with self._lock:
            self._release(place)

    def add(self, artifact: StoredArtifact, place: Reservation) -> None:
        """Puts an artifact in its place, as its model's current one."""
        with self._lock:
            self._release(place)
            self._remove(artifact.model_digest, artifact.digest)
            self._insert(artifact)

    def remove(self, artifact: StoredArtifact) -> None:
        """Forgets an artifact, if it has not been put anew since."""
        with self._lock:
            if self._models.get(artifact.model_digest, {}).get(artifact.digest) is artifact:
                self._remove(artifact.model_digest, artifact.digest)

    def close(self) -> None:
        """Refuses all further use, but for giving back places."""
        with self._lock:
            self._closed = True

    def _insert(self, artifact: StoredArtifact) -> None:
        self._models.setdefault(artifact.model_digest, {})[artifact.digest] = artifact
        self._stored_bytes += artifact.size_bytes
        self._artifacts += 1

    def _remove(self, model_digest: bytes, digest: bytes) -> None:
        of_model = self._models.get(model_digest, {})
        removed = of_model.pop(digest, None)
        if removed is None:
            return
        self._stored_bytes -= removed.size_bytes
        self._artifacts -= 1
        if not of_model:
            del self._models[model_digest]

    def _release(self, place: Reservation) -> None:
        self._reserved_bytes -= place.held_bytes
        self._reserved_artifacts -= place.held_artifacts
        place.held_bytes = place.held_artifacts = 0

    def _require_open(self) -> None:
        if self._closed:
            raise StorageUnavailableError("the store of calibrations is closed")
