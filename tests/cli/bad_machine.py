"""A machine whose clock jumps and whose disk fails or waits, for one peer: ``bad_machine.c`` before the C library."""

import contextlib
import ctypes
import mmap
import os
import pathlib
import subprocess
import time

import pytest

_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_PATIENCE_S = 60


class _Faults(ctypes.Structure):
    """As ``struct faults`` there."""

    _fields_ = (
        ("clock_offset_s", ctypes.c_int64),
        ("write_errno", ctypes.c_int32),
        ("syncs_wait", ctypes.c_int32),
        ("waiting", ctypes.c_int32),
        ("directory", ctypes.c_char * 4096),
    )


class BadMachine:
    """Faults of the processes that are started in :meth:`here`, files below a directory of their own alone."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Compiles what goes before the C library; a machine without a compiler can't run this."""
        self.disk = directory / "disk"
        self.disk.mkdir()
        self._library = directory / "bad_machine.so"
        command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", self._library, _SOURCE, "-ldl"]
        subprocess.run(command, check=True)
        self._file = directory / "faults"
        self._file.write_bytes(bytes(ctypes.sizeof(_Faults)))
        with self._file.open("r+b") as file:
            self._faults = _Faults.from_buffer(mmap.mmap(file.fileno(), 0))
        self._faults.directory = os.fsencode(self.disk.resolve())

    @contextlib.contextmanager
    def here(self):
        """Processes that are started in the block are on this machine."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self._library))
            patch.setenv("KVCODEC_BAD_MACHINE", str(self._file))
            yield

    def set_clock(self, offset_s: int) -> None:
        """The clock of the day is that much ahead of the true one."""
        self._faults.clock_offset_s = offset_s

    @contextlib.contextmanager
    def failing_writes(self, number: int):
        """All writes fail with this ``errno``."""
        self._faults.write_errno = number
        try:
            yield
        finally:
            self._faults.write_errno = 0

    @contextlib.contextmanager
    def stuck_disk(self):
        """Nothing is synced in the block; gives a function that waits until somebody wants to."""
        self._faults.syncs_wait = 1
        try:
            yield self._wait_for_sync
        finally:
            self._faults.syncs_wait = 0

    def _wait_for_sync(self) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._faults.waiting:
            assert time.monotonic() < deadline_s, "nobody syncs"
            time.sleep(0.01)
