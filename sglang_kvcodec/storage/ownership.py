"""One process at a time may write a store's directory."""

from __future__ import annotations

import fcntl
import pathlib
from typing import IO

from sglang_kvcodec.errors import StorageUnavailableError

OWNER_FILE = "owner.lock"


def own_directory(directory: pathlib.Path) -> IO[bytes]:
    """Takes ``directory``, which exists, until the file that this gives is closed, or the process ends.

    Raises:
        StorageUnavailableError: another store has it open, or it can't be written.
    """
    try:
        owner_file = (directory / OWNER_FILE).open("ab")
    except OSError as error:
        raise StorageUnavailableError(f"can't open the store {directory}: {error.strerror}") from error
    try:
        fcntl.flock(owner_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner_file.close()
        if isinstance(error, BlockingIOError):
            raise StorageUnavailableError(f"the store {directory} is in use by another peer") from error
        raise StorageUnavailableError(f"can't lock the store {directory}: {error.strerror}") from error
    return owner_file
