"""A directory with an LMDB environment of ours: who may open it, what is in it, and its errors in our words."""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import IO, Any

import lmdb

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage.artifacts import ARTIFACTS_DIRECTORY
from sglang_kvcodec.storage.lmdb_tables import (
    FORMAT_KEY,
    FORMAT_VERSION,
    READ_VERSIONS,
    TABLE_COUNT,
    StoreTransaction,
    Tables,
)
from sglang_kvcodec.storage.ownership import OWNER_FILE, own_directory

_DATA_FILE = "data.mdb"
_READERS_FILE = "lock.mdb"
_OUR_FILES = {_DATA_FILE, _READERS_FILE, OWNER_FILE, ARTIFACTS_DIRECTORY}
_READERS_FILE_BYTES = 128 << 10
"""LMDB's table of readers, 64 bytes each: about 2 000 reads at one moment, far more than a peer has threads."""


class FileFullError(StorageUnavailableError):
    """The data file may not grow and has no room that fits; what is evicted makes room."""


class LmdbEnvironment:
    """Owns the directory for this process: no other engine can have it open at the same time.

    LMDB unmaps its file when it is closed, under the hands of a reader if there is one. So whoever uses it is counted,
    and closing waits for them.
    """

    def __init__(self, directory: pathlib.Path, max_file_bytes: int) -> None:
        """Opens the directory; creates it and what is in it if it is missing or empty.

        Raises:
            ConfigurationError: it holds something else, or a store of another version.
            StorageUnavailableError: in use by another engine, read-only, disk full.
        """
        self._directory = directory
        self._map_bytes = _whole_pages(max_file_bytes)
        self._state = threading.Condition()
        self._users = 0
        self._closed = False
        self._broken = False
        self._growing = False
        with contextlib.ExitStack() as undo:
            self._owner_file = undo.enter_context(self._own_directory())
            self._allocate_readers_file()
            self._environment: Any
            self._tables: Tables
            self._open()
            undo.pop_all()

    @contextlib.contextmanager
    def reading(self, *, views: bool = True) -> Iterator[StoreTransaction]:
        """A snapshot; never waits for a writer.

        Args:
            views: what is read is a view into the map, so that a part of an object is copied without the rest. Records
                are read faster as bytes.

        Raises:
            StorageUnavailableError: closed, or LMDB failed.
        """
        with self._using(), self._snapshot(views) as store:
            yield store

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Stays open meanwhile; for what is known of it without a look into it.

        Raises:
            StorageUnavailableError: closed, or LMDB failed.
        """
        with self._using():
            yield

    @contextlib.contextmanager
    def reading_now(self) -> Iterator[StoreTransaction | None]:
        """A snapshot of views; None where to enter it would wait.

        Raises:
            StorageUnavailableError: LMDB failed.
        """
        if not self._entered_now():
            yield None
            return
        try:
            with self._snapshot(views=True) as store:
                yield store
        finally:
            self._leave()

    def _entered_now(self) -> bool:
        if not self._state.acquire(blocking=False):
            return False
        try:
            is_open = not (self._growing or self._broken or self._closed)
            self._users += is_open
            return is_open
        finally:
            self._state.release()

    @contextlib.contextmanager
    def _snapshot(self, views: bool) -> Iterator[StoreTransaction]:
        with self._errors_in_our_words(), self._environment.begin(buffers=views) as transaction:
            yield StoreTransaction(transaction, self._tables)

    @contextlib.contextmanager
    def writing(self) -> Iterator[StoreTransaction]:
        """A transaction that is on the disk when the block ends, or has not happened if the block or this raises.

        Raises:
            FileFullError: the data file has no room.
            StorageUnavailableError: closed, disk full, or LMDB failed.
        """
        with self._using(), self._errors_in_our_words(), self._environment.begin(write=True) as transaction:
            store = StoreTransaction(transaction, self._tables)
            yield store
            store.save_counts()

    def allow_file(self, max_file_bytes: int) -> None:
        """Lets the data file grow to ``max_file_bytes``, if it may not yet; waits for all who use it.

        Raises:
            StorageUnavailableError: closed, or LMDB failed.
        """
        map_bytes = _whole_pages(max_file_bytes)
        with self._state:
            if map_bytes <= self._map_bytes:
                return
            # LMDB maps the file anew, under the hands of a reader if there is one.
            self._state.wait_for(lambda: not self._growing)
            self._growing = True
            try:
                self._state.wait_for(lambda: self._users == 0)
                if self._closed:
                    raise StorageUnavailableError("the store is closed")
                if not self._broken:
                    with self._errors_in_our_words():
                        self._environment.set_mapsize(map_bytes)
                self._map_bytes = map_bytes
            finally:
                self._growing = False
                self._state.notify_all()

    def close(self) -> None:
        """Waits for those inside a transaction, then releases the directory. May be called twice."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.wait_for(lambda: self._users == 0)
            self._environment.close()
            self._owner_file.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def _own_directory(self) -> IO[bytes]:
        try:
            if self._directory.exists() and not self._directory.is_dir():
                raise ConfigurationError(f"{self._directory} is not a directory")
            self._directory.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self._directory.iterdir()}
            if _DATA_FILE not in names and not names <= _OUR_FILES:
                raise ConfigurationError(f"{self._directory} holds other files and no store: name an empty directory")
        except OSError as error:
            raise StorageUnavailableError(f"can't open the store {self._directory}: {error.strerror}") from error
        return own_directory(self._directory)

    def _allocate_readers_file(self) -> None:
        # LMDB leaves this file sparse and writes to it through a mapping: on a full disk that is a bus error, which
        # ends the process. LMDB takes the number of readers from the size it finds.
        try:
            with (self._directory / _READERS_FILE).open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, _READERS_FILE_BYTES)
        except OSError as error:
            raise StorageUnavailableError(f"can't open the store {self._directory}: {error.strerror}") from error

    def _open(self) -> None:
        data_file = self._directory / _DATA_FILE
        was_there = data_file.exists()
        with self._errors_in_our_words():
            try:
                self._environment = lmdb.open(str(self._directory), map_size=self._map_bytes, max_dbs=TABLE_COUNT)
            except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError) as error:
                raise ConfigurationError(f"{data_file} is not an LMDB file of ours") from error
            except lmdb.Error:
                # A beginning of a file would be taken for something else the next time.
                if not was_there:
                    data_file.unlink(missing_ok=True)
                raise
            with contextlib.ExitStack() as undo:
                undo.callback(self._environment.close)
                with self._environment.begin() as transaction:
                    version = transaction.get(FORMAT_KEY)
                    is_new = transaction.stat()["entries"] == 0
                if not is_new and version is None:
                    raise ConfigurationError(f"{self._directory} holds another program's LMDB data")
                if not is_new and version not in READ_VERSIONS:
                    raise ConfigurationError(
                        f"the store {self._directory} has format {version.decode(errors='replace')}, this version of"
                        f" sglang-kvcodec reads {FORMAT_VERSION.decode()}: name an empty directory"
                    )
                with self._environment.begin(write=True) as transaction:
                    self._tables = Tables.open(self._environment, transaction)
                    if version != FORMAT_VERSION:
                        # What is written from here on is not for a version that does not know it.
                        transaction.put(FORMAT_KEY, FORMAT_VERSION)
                undo.pop_all()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        with self._state:
            self._state.wait_for(lambda: not self._growing)
            if self._broken:
                self._state.wait_for(lambda: self._users == 0)
            if self._closed:
                raise StorageUnavailableError("the store is closed")
            if self._broken:
                self._environment.close()
                self._open()
                self._broken = False
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._state:
            self._users -= 1
            self._state.notify_all()

    @contextlib.contextmanager
    def _errors_in_our_words(self) -> Iterator[None]:
        try:
            yield
        except lmdb.PanicError as error:
            # LMDB could not write its root and refuses all further work; opening it again finds the last good root.
            self._broken = True
            raise StorageUnavailableError(f"the store {self._directory} failed: {error}") from error
        except lmdb.MapFullError as error:
            raise FileFullError(f"the data file of {self._directory} is full") from error
        except lmdb.Error as error:
            raise StorageUnavailableError(f"the store {self._directory} failed: {error}") from error


def _whole_pages(size_bytes: int) -> int:
    # LMDB maps whole pages.
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
