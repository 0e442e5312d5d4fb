"""The interface of a store of calibration artifacts: opaque bytes named by their SHA-256, filed under a model.

Unlike page objects they are never evicted: pages coded with an artifact can't be read without it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib

from sglang_kvcodec.config import MAX_ARTIFACT_BYTES
from sglang_kvcodec.errors import ChecksumError, FormatError, TruncatedError
from sglang_kvcodec.format.digest import ARTIFACT_DIGEST_BYTES, Buffer, artifact_digest
from sglang_kvcodec.format.exchange import CalibrationEntry

ARTIFACTS_DIRECTORY = "calibrations"
"""Name of a store of artifacts inside the directory of a peer's storage engine."""
MAX_ARTIFACTS = 10_000
"""A store takes no more, however small they are; so a list of them fits one message."""
_WRITE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ArtifactStat:
    """Counts of a store.

    Attributes:
        artifacts: artifacts stored now.
        stored_bytes: their bytes.
        capacity_bytes: the bound that no put exceeds.
    """

    artifacts: int
    stored_bytes: int
    capacity_bytes: int


class ArtifactWriter(abc.ABC):
    """One artifact on its way in, with its place in the store reserved until :meth:`commit` or :meth:`abort`.

    Thread-safe: an abort waits for the call that is under way.
    """

    @abc.abstractmethod
    def write(self, chunk: Buffer) -> None:
        """Takes the next bytes.

        Raises:
            FormatError: no bytes, or more than were announced.
            StorageUnavailableError: the disk is full or failed, or the writer has ended.
        """

    @abc.abstractmethod
    def commit(self) -> None:
        """Makes the artifact visible, whole, and its model's current one; it survives a crash from now on.

        Raises:
            TruncatedError: bytes are missing.
            ChecksumError: they do not have the announced digest.
            CapacityError: what it should have replaced is gone, and there is no room for it anew.
            StorageUnavailableError: the disk is full or failed, or the writer has ended; nothing is visible.
        """

    @abc.abstractmethod
    def abort(self) -> None:
        """Forgets what has come and frees its place, unless it is committed. May be called twice."""


class ArtifactReader(abc.ABC):
    """An artifact being read, from its start to its end. Thread-safe; not disturbed by a delete after the first read.

    Attributes:
        digest: SHA-256 of the artifact.
        size_bytes: of the artifact.
    """

    digest: bytes
    size_bytes: int

    @abc.abstractmethod
    def read(self, most_bytes: int) -> bytes:
        """The next bytes, at most ``most_bytes``, which is at least one; empty at the end.

        The last ones are only given if all of them have the digest: who got ``size_bytes`` bytes got the artifact.

        Raises:
            NotFoundError: it was deleted before the first read.
            FormatError: it is damaged, or gone without a delete; it is no longer stored.
            StorageUnavailableError: the disk failed; the artifact may still be there.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends reading. May be called twice."""


class ArtifactStore(abc.ABC):
    """Stores calibration artifacts. Thread-safe. What is not marked as blocking does not wait for a disk.

    Of each model the artifact that was put last is the current one. Where that is deleted or found damaged, the one put
    before it is.
    """

    @abc.abstractmethod
    def receive(self, model_digest: bytes, digest: bytes, size_bytes: int) -> ArtifactWriter:
        """Reserves the place of an artifact that is to come; the writer's methods block.

        One that is already there may come again: its bytes are written anew, in the place of the old ones once they
        are whole, and it becomes current.

        Raises:
            FormatError: digests that are none, or a size that no artifact has.
            CapacityError: there is no room for it.
            StorageUnavailableError: the store is closed.
        """

    @abc.abstractmethod
    def open(self, model_digest: bytes, digest: bytes | None = None) -> ArtifactReader | None:
        """A model's artifact, the current one by default; None if there is none. The reader's methods block.

        Raises:
            FormatError: digests that are none.
            StorageUnavailableError: the store is closed.
        """

    @abc.abstractmethod
    def current(self, model_digest: bytes) -> bytes | None:
        """Digest of a model's current artifact, None if there is none; raises as :meth:`open`."""

    @abc.abstractmethod
    def entries(self) -> list[CalibrationEntry]:
        """All artifacts, by model digest; those of a model in the order they were put."""

    @abc.abstractmethod
    def delete(self, model_digest: bytes, digest: bytes) -> bool:
        """Removes an artifact; whether it was there. Blocking.

        Raises:
            FormatError: digests that are none.
            StorageUnavailableError: the disk failed, or the store is closed.
        """

    @abc.abstractmethod
    def of_tenant(self, tenant: str) -> ArtifactStore:
        """A store of its own, of the same capacity, kept beside this one; the caller's to close. Blocking.

        Args:
            tenant: may be the name of a directory.

        Raises:
            StorageUnavailableError: it can't be opened, or is open.
        """

    @abc.abstractmethod
    def stat(self) -> ArtifactStat:
        """Counts now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it. What is on its way in can only be aborted from now on. May be called twice."""

    def put(self, model_digest: bytes, artifact: Buffer) -> bytes:
        """Stores an artifact that is in memory; its digest. Blocking; raises as :meth:`receive` and the writer."""
        digest = artifact_digest(artifact)
        writer = self.receive(model_digest, digest, len(artifact))
        view = memoryview(artifact)
        with contextlib.ExitStack() as undo:
            undo.callback(writer.abort)
            for start in range(0, len(view), _WRITE_BYTES):
                writer.write(view[start : start + _WRITE_BYTES])
            writer.commit()
        return digest


class ArtifactCheck:
    """Counts and hashes the bytes of one artifact as they pass."""

    def __init__(self, digest: bytes, size_bytes: int) -> None:
        self._digest = digest
        self._size_bytes = size_bytes
        self._hash = hashlib.sha256()
        self._passed_bytes = 0

    @property
    def left_bytes(self) -> int:
        """Bytes that are still to come."""
        return self._size_bytes - self._passed_bytes

    def add(self, chunk: Buffer) -> None:
        """Takes note of the next bytes.

        Raises:
            FormatError: no bytes, or more than the artifact has.
        """
        if not chunk:
            raise FormatError("a chunk without bytes")
        if len(chunk) > self.left_bytes:
            raise TruncatedError(f"calibration {self._digest.hex()}: more than its {self._size_bytes} bytes")
        self._hash.update(chunk)
        self._passed_bytes += len(chunk)

    def require_whole(self) -> None:
        """Refuses anything but the whole artifact.

        Raises:
            TruncatedError: bytes are missing.
            ChecksumError: they have another digest.
        """
        if self.left_bytes:
            raise TruncatedError(
                f"calibration {self._digest.hex()}: {self._passed_bytes} of its {self._size_bytes} bytes"
            )
        if self._hash.digest() != self._digest:
            raise ChecksumError(f"calibration {self._digest.hex()}: its bytes have the digest {self._hash.hexdigest()}")


def require_digests(model_digest: bytes, digest: bytes | None = None) -> None:
    """Refuses what can't name an artifact.

    Raises:
        FormatError: another length.
    """
    if len(model_digest) != ARTIFACT_DIGEST_BYTES:
        raise FormatError(f"a model digest has {ARTIFACT_DIGEST_BYTES} bytes, not {len(model_digest)}")
    if digest is not None:
        require_digest(digest)


def require_digest(digest: bytes) -> None:
    """Refuses what can't be an artifact's digest.

    Raises:
        FormatError: another length.
    """
    if len(digest) != ARTIFACT_DIGEST_BYTES:
        raise FormatError(f"a calibration's digest has {ARTIFACT_DIGEST_BYTES} bytes, not {len(digest)}")


def require_size(size_bytes: int) -> None:
    """Refuses a size that no artifact has.

    Raises:
        FormatError: none, or more than ``config.MAX_ARTIFACT_BYTES``.
    """
    if not 0 < size_bytes <= MAX_ARTIFACT_BYTES:
        raise FormatError(f"a calibration has 1 to {MAX_ARTIFACT_BYTES} bytes, not {size_bytes}")
