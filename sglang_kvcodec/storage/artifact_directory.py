"""Calibration artifacts as files: ``<model digest>/<digest>``, and ``<model digest>/current``, which names one of them.

A file comes under its name by a rename, after its bytes are on the disk, so there is never a part of one. Names are
hex of digests and of nothing else. Files of other names are left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import re
import secrets
import threading
import time
from collections.abc import Iterator
from typing import IO

from sglang_kvcodec.config import MAX_ARTIFACT_BYTES
from sglang_kvcodec.errors import (
    ConfigurationError,
    FormatError,
    NotFoundError,
    StorageUnavailableError,
    TruncatedError,
)
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
from sglang_kvcodec.storage.ownership import own_directory

_TENANTS_DIRECTORY = "tenants"
_CURRENT_FILE = "current"
_CURRENT_BYTES = 65
_UNFINISHED_NAME = re.compile(r"[0-9a-f]{16}\.part")
_DIGEST_NAME = re.compile(r"[0-9a-f]{64}")
_SYNC_EVERY_BYTES = 32 << 20
"""Written bytes that may wait for the disk: so a commit is short, and a slow disk slows the one who sends."""

_logger = logging.getLogger(__name__)


class DirectoryArtifactStore(ArtifactStore):
    """Artifacts in a directory that no other store has open."""

    def __init__(self, directory: pathlib.Path, capacity_bytes: int) -> None:
        """Opens or creates the directory, and removes what a crash left unfinished.

        Where there is more than ``capacity_bytes`` already, it stays, and nothing more is taken.

        Raises:
            ConfigurationError: the directory is a file.
            StorageUnavailableError: in use by another store, read-only, disk full.
        """
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._change_lock = threading.Lock()
        if directory.exists() and not directory.is_dir():
            raise ConfigurationError(f"{directory} is not a directory")
        with self._errors_in_our_words(), contextlib.ExitStack() as undo:
            if not directory.is_dir():
                directory.mkdir(parents=True)
                _sync_directory(directory.parent)
            self._owner_file = undo.enter_context(own_directory(directory))
            for path in directory.iterdir():
                if _UNFINISHED_NAME.fullmatch(path.name):
                    _logger.info("removing %s, which was never finished", path)
                    path.unlink()
            self._index = ArtifactIndex(capacity_bytes, _stored_files(directory))
            undo.pop_all()
        stat = self._index.stat()
        if stat.stored_bytes > capacity_bytes:
            _logger.warning(
                "%s holds %d bytes of calibrations, more than the %d it may: none is taken until some are deleted",
                *(directory, stat.stored_bytes, capacity_bytes),
            )

    def receive(self, model_digest: bytes, digest: bytes, size_bytes: int) -> ArtifactWriter:
        """See the base class."""
        require_digests(model_digest, digest)
        require_size(size_bytes)
        place = Reservation()
        self._index.reserve(place, model_digest, digest, size_bytes)
        return _FileWriter(self, model_digest, digest, size_bytes, place)

    def open(self, model_digest: bytes, digest: bytes | None = None) -> ArtifactReader | None:
        """See the base class."""
        require_digests(model_digest, digest)
        artifact = self._index.find(model_digest, digest)
        return None if artifact is None else _FileReader(self, self._path(artifact), artifact)

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
            self._remove(artifact)
            return True

    def of_tenant(self, tenant: str) -> DirectoryArtifactStore:
        """See the base class: in ``tenants/<tenant>``."""
        return DirectoryArtifactStore(self._directory / _TENANTS_DIRECTORY / tenant, self._capacity_bytes)

    def stat(self) -> ArtifactStat:
        """See the base class."""
        return self._index.stat()

    def close(self) -> None:
        """See the base class."""
        with self._change_lock:
            self._index.close()
            self._owner_file.close()

    def time_of_put_ms(self, model_digest: bytes) -> int:
        """Of an artifact that is put now, in milliseconds of Unix time: after all of its model, whatever time it is.

        The next start finds their order by it.
        """
        newest = self._index.find(model_digest)
        now_ms = time.time_ns() // 10**6
        return now_ms if newest is None else max(now_ms, newest.stored_at_ms + 1)

    def new_file(self) -> tuple[pathlib.Path, int]:
        """For the writers: a file of a name that nobody reads, with its descriptor."""
        path = self._directory / f"{secrets.token_hex(8)}.part"
        with self._errors_in_our_words():
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def publish(self, artifact: StoredArtifact, unfinished: pathlib.Path, place: Reservation) -> None:
        """For the writers: makes a file visible whose bytes are all on the disk, and current."""
        path = self._path(artifact)
        with self._change_lock, self._errors_in_our_words(), contextlib.ExitStack() as undo:
            self._index.reserve(place, artifact.model_digest, artifact.digest, artifact.size_bytes)
            is_new = self._index.find(artifact.model_digest, artifact.digest) is None
            if not path.parent.is_dir():
                path.parent.mkdir()
                undo.callback(_remove_if_empty, path.parent)
                _sync_directory(self._directory)
            current = self._write_current_file(artifact.digest)
            undo.callback(current.unlink, missing_ok=True)
            os.rename(unfinished, path)
            if is_new:
                undo.callback(path.unlink, missing_ok=True)
            # A crash before this leaves a `current` that names an older one: whole, and as it was before this put.
            os.rename(current, path.parent / _CURRENT_FILE)
            _sync_directory(path.parent)
            undo.pop_all()
            self._index.add(artifact, place)

    def release(self, place: Reservation) -> None:
        """For the writers: gives back what one of them has reserved."""
        self._index.release(place)

    def holds(self, artifact: StoredArtifact) -> bool:
        """For the readers: whether it has neither been deleted nor put anew; waits for a delete under way."""
        with self._change_lock:
            return self._holds(artifact)

    def remove_damaged(self, artifact: StoredArtifact, error: FormatError) -> None:
        """For the readers: removes what can't be used, unless it has been put anew since."""
        with self._change_lock:
            if not self._holds(artifact):
                return
            _logger.warning("removing a calibration that is damaged: %s", error)
            try:
                self._remove(artifact)
            except StorageUnavailableError as failure:
                _logger.warning("it stays on the disk: %s", failure)
                self._index.remove(artifact)

    def _holds(self, artifact: StoredArtifact) -> bool:
        return self._index.find(artifact.model_digest, artifact.digest) is artifact

    def _remove(self, artifact: StoredArtifact) -> None:
        path = self._path(artifact)
        current = self._index.find(artifact.model_digest)
        with self._errors_in_our_words():
            path.unlink(missing_ok=True)
            self._index.remove(artifact)
            if artifact is current:
                # Without it the file that was put last is the current one.
                (path.parent / _CURRENT_FILE).unlink(missing_ok=True)
            _sync_directory(path.parent)
            _remove_if_empty(path.parent)

    def _write_current_file(self, digest: bytes) -> pathlib.Path:
        path, descriptor = self.new_file()
        with contextlib.ExitStack() as undo:
            undo.callback(path.unlink, missing_ok=True)
            with open(descriptor, "wb") as file:
                file.write(digest.hex().encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
            undo.pop_all()
        return path

    def _path(self, artifact: StoredArtifact) -> pathlib.Path:
        return self._directory / artifact.model_digest.hex() / artifact.digest.hex()

    @contextlib.contextmanager
    def _errors_in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageUnavailableError(f"the calibrations in {self._directory}: {error.strerror}") from error


def _stored_files(directory: pathlib.Path) -> Iterator[StoredArtifact]:
    """What is in the directory, of each model the current one last."""
    for of_model in directory.iterdir():
        if not _DIGEST_NAME.fullmatch(of_model.name) or not of_model.is_dir():
            continue
        found = []
        with os.scandir(of_model) as entries:
            for entry in entries:
                if _DIGEST_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    if not 0 < stat.st_size <= MAX_ARTIFACT_BYTES:
                        _logger.warning("%s can't be a calibration, it has %d bytes", entry.path, stat.st_size)
                        continue
                    digests = bytes.fromhex(of_model.name), bytes.fromhex(entry.name)
                    found.append(StoredArtifact(*digests, stat.st_size, stat.st_mtime_ns // 10**6))
        current = _named_by_current_file(of_model)
        yield from sorted(found, key=lambda artifact: (artifact.digest == current, artifact.stored_at_ms))


def _named_by_current_file(of_model: pathlib.Path) -> bytes | None:
    try:
        with (of_model / _CURRENT_FILE).open("rb") as file:
            name = file.read(_CURRENT_BYTES).removesuffix(b"\n").decode("ascii", "replace")
    except OSError:
        return None
    return bytes.fromhex(name) if _DIGEST_NAME.fullmatch(name) else None


def _sync_directory(directory: pathlib.Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


class _FileWriter(ArtifactWriter):
    def __init__(
        self, store: DirectoryArtifactStore, model_digest: bytes, digest: bytes, size_bytes: int, place: Reservation
    ) -> None:
        self._store = store
        self._model_digest = model_digest
        self._digest = digest
        self._size_bytes = size_bytes
        self._place = place
        self._check = ArtifactCheck(digest, size_bytes)
        self._lock = threading.Lock()
        self._file: tuple[pathlib.Path, int] | None = None
        self._unsynced_bytes = 0
        self._ended = False

    def write(self, chunk: Buffer) -> None:
        with self._lock:
            self._require_open()
            self._check.add(chunk)
            if self._file is None:
                self._file = self._store.new_file()
            view = memoryview(chunk)
            with self._errors_in_our_words():
                while view:
                    view = view[os.write(self._file[1], view) :]
                self._unsynced_bytes += len(chunk)
                if self._unsynced_bytes >= _SYNC_EVERY_BYTES:
                    os.fdatasync(self._file[1])
                    self._unsynced_bytes = 0

    def commit(self) -> None:
        with self._lock:
            self._require_open()
            self._check.require_whole()
            assert self._file is not None  # an artifact has at least one byte
            path, descriptor = self._file
            stored_at_ms = self._store.time_of_put_ms(self._model_digest)
            with self._errors_in_our_words():
                os.utime(descriptor, ns=(stored_at_ms * 10**6, stored_at_ms * 10**6))
                os.fsync(descriptor)
            artifact = StoredArtifact(self._model_digest, self._digest, self._size_bytes, stored_at_ms)
            self._store.publish(artifact, path, self._place)
            os.close(descriptor)
            self._ended = True

    def abort(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._file is not None:
                path, descriptor = self._file
                os.close(descriptor)
                # What can't be removed now is removed at the next start.
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self._store.release(self._place)

    def _require_open(self) -> None:
        if self._ended:
            raise StorageUnavailableError("this calibration has been committed or given up")

    @contextlib.contextmanager
    def _errors_in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageUnavailableError(f"can't write a calibration: {error.strerror}") from error


class _FileReader(ArtifactReader):
    def __init__(self, store: DirectoryArtifactStore, path: pathlib.Path, artifact: StoredArtifact) -> None:
        self.digest = artifact.digest
        self.size_bytes = artifact.size_bytes
        self._store = store
        self._path = path
        self._artifact = artifact
        self._check = ArtifactCheck(artifact.digest, artifact.size_bytes)
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._ended = False

    def read(self, most_bytes: int) -> bytes:
        if most_bytes < 1:
            raise ValueError("a read of no bytes would look like the end")
        with self._lock:
            if self._ended:
                return b""
            try:
                return self._read(most_bytes)
            except NotFoundError:
                self._end()
                raise
            except FormatError as error:
                self._end()
                self._store.remove_damaged(self._artifact, error)
                raise
            except OSError as error:
                self._end()
                raise StorageUnavailableError(f"can't read {self._path}: {error.strerror}") from error

    def close(self) -> None:
        with self._lock:
            self._end()

    def _read(self, most_bytes: int) -> bytes:
        if self._file is None:
            try:
                self._file = os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
            except FileNotFoundError:
                if not self._store.holds(self._artifact):
                    raise NotFoundError(f"calibration {self.digest.hex()} has been deleted") from None
                raise TruncatedError(f"{self._path} is gone") from None
        data = self._file.read(min(most_bytes, self._check.left_bytes))
        if data:
            self._check.add(data)
        # Nothing before all has been read is a file that ends early.
        if not self._check.left_bytes or not data:
            if self._file.read(1):
                raise TruncatedError(f"{self._path} is longer than its {self.size_bytes} bytes")
            self._check.require_whole()
            self._end()
        return data

    def _end(self) -> None:
        self._ended = True
        if self._file is not None:
            self._file.close()
            self._file = None
