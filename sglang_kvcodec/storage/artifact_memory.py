"""Calibration artifacts in this process's memory: for tests, and for a peer whose store may be lost."""

from __future__ import annotations

import io
import threading
import time

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.exchange import CalibrationEntry
from sglang_kvcodec.storage.artifact_index import ArtifactIndex, Reservation, StoredArtifact
from sglang_kvcodec.storage.artifacts import (
    ArtifactCheck,
    ArtifactReader,
    ArtifactStat,
    ArtifactStore,
    ArtifactWriter,
    require_digests,
    require_size,
)


class MemoryArtifactStore(ArtifactStore):
    """Artifacts in a dict."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._index = ArtifactIndex(capacity_bytes)
        self._change_lock = threading.Lock()
        self._contents: dict[StoredArtifact, bytes] = {}

    def receive(self, model_digest: bytes, digest: bytes, size_bytes: int) -> ArtifactWriter:
        """See the base class."""
        require_digests(model_digest, digest)
        require_size(size_bytes)
        place = Reservation()
        self._index.reserve(place, model_digest, digest, size_bytes)
        return _MemoryWriter(self, model_digest, digest, size_bytes, place)

    def open(self, model_digest: bytes, digest: bytes | None = None) -> ArtifactReader | None:
        """See the base class."""
        require_digests(model_digest, digest)
        with self._change_lock:
            artifact = self._index.find(model_digest, digest)
            return None if artifact is None else _MemoryReader(artifact.digest, self._contents[artifact])

    def current(self, model_digest: bytes) -> bytes | None:
        """See the base class."""
        require_digests(model_digest)
        artifact = self._index.find(model_digest)
        return None if artifact is None else artifact.digest

    def entries(self) -> list[CalibrationEntry]:
        """See the base class."""
        return self._index.entries()

    def delete(self, model_digest: bytes, digest: bytes) -> bool:
        """See the base class."""
        require_digests(model_digest, digest)
        with self._change_lock:
            artifact = self._index.find(model_digest, digest)
            if artifact is None:
                return False
            self._index.remove(artifact)
            del self._contents[artifact]
            return True

    def of_tenant(self, tenant: str) -> MemoryArtifactStore:
        """See the base class; forgotten when it is closed."""
        return MemoryArtifactStore(self._capacity_bytes)

    def stat(self) -> ArtifactStat:
        """See the base class."""
        return self._index.stat()

    def close(self) -> None:
        """See the base class."""
        with self._change_lock:
            self._index.close()
            self._contents.clear()

    def publish(self, artifact: StoredArtifact, content: bytes, place: Reservation) -> None:
        """For the writers: makes an artifact visible that has all its bytes."""
        with self._change_lock:
            self._index.reserve(place, artifact.model_digest, artifact.digest, artifact.size_bytes)
            replaced = self._index.find(artifact.model_digest, artifact.digest)
            self._index.add(artifact, place)
            self._contents[artifact] = content
            if replaced is not None:
                del self._contents[replaced]

    def release(self, place: Reservation) -> None:
        """For the writers: gives back what one of them has reserved."""
        self._index.release(place)


class _MemoryWriter(ArtifactWriter):
    def __init__(
        self, store: MemoryArtifactStore, model_digest: bytes, digest: bytes, size_bytes: int, place: Reservation
    ) -> None:
        self._store = store
        self._model_digest = model_digest
        self._digest = digest
        self._size_bytes = size_bytes
        self._place = place
        self._lock = threading.Lock()
        self._check = ArtifactCheck(digest, size_bytes)
        # Grows with what comes, and gives it up at the end without a copy.
        self._content: io.BytesIO | None = io.BytesIO()

    def write(self, chunk: Buffer) -> None:
        with self._lock:
            content = self._require_open()
            self._check.add(chunk)
            content.write(chunk)

    def commit(self) -> None:
        with self._lock:
            content = self._require_open()
            self._check.require_whole()
            artifact = StoredArtifact(self._model_digest, self._digest, self._size_bytes, time.time_ns() // 10**6)
            self._store.publish(artifact, content.getvalue(), self._place)
            self._content = None

    def abort(self) -> None:
        with self._lock:
            if self._content is not None:
                self._content = None
                self._store.release(self._place)

    def _require_open(self) -> io.BytesIO:
        if self._content is None:
            raise StorageUnavailableError("this calibration has been committed or given up")
        return self._content


class _MemoryReader(ArtifactReader):
    def __init__(self, digest: bytes, content: bytes) -> None:
        self.digest = digest
        self.size_bytes = len(content)
        self._lock = threading.Lock()
        self._content = io.BytesIO(content)

    def read(self, most_bytes: int) -> bytes:
        with self._lock:
            return self._content.read(most_bytes)

    def close(self) -> None:
        # What was put is this process's own bytes object; there is nothing to let go of but this reference.
        self._content = io.BytesIO()
