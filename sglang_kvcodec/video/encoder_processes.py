"""A bounded pool of processes that encode, so that libx265 never holds a serving process's interpreter up."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import ConfigurationError, EncoderDiedError
from sglang_kvcodec.video import encoder_worker
from sglang_kvcodec.video.base import Canvases, EncodedPictures
from sglang_kvcodec.video.child_environment import child_environment

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
"""A busy machine may take long to start Python."""
ENCODE_TIMEOUT_S = 120.0
"""Silence after which a process counts as hung."""
_END_TIMEOUT_S = 2.0
_PROGRAM = f"import sys; from {encoder_worker.__name__} import main; main(sys.argv[1:])"
"""Not ``-m``: the package has imported the module by the time it would run."""


class EncoderProcesses:
    """Encoder processes, each of which works for one thread at a time. Thread-safe.

    A process that dies or hangs is replaced when it is next needed; the pictures it was coding are lost.
    """

    name = "x265"
    takes_device_canvases = False

    def __init__(self, count: int) -> None:
        """Starts them and waits until they are ready.

        Raises:
            ConfigurationError: one does not start.
        """
        self._is_closed = False
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        """None stands for a process that has to be started first."""
        try:
            self._workers = [_Worker() for _ in range(count)]
            for worker in self._workers:
                worker.wait_until_ready()
        except EncoderDiedError as error:
            self.close()
            raise ConfigurationError(f"an encoder process does not start: {error}") from error
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that are there now."""
        with self._lock:
            return [worker.process_id for worker in self._workers]

    def encoder(self, *, uniform_blocks: bool = False) -> ProcessEncoder:
        """An encoder that works in whichever process is free; see ``open_encoder`` for the argument."""
        return ProcessEncoder(self, uniform_blocks)

    def encode(self, canvases: Canvases, uniform_blocks: bool) -> EncodedPictures:
        """See ``PictureEncoder.encode``; waits for a free process.

        Raises:
            CodecError: the encoder failed.
            EncoderDiedError: its process died or hung, or can't be started again.
        """
        with self._worker() as worker:
            return worker.encode(canvases, uniform_blocks)

    def close(self) -> None:
        """Ends all processes; what they are coding is lost."""
        with self._lock:
            self._is_closed = True
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.end()

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            self._check_open()
            if worker is None or not worker.is_alive:
                if worker is not None:
                    logger.error("kvcodec: an encoder process has died while it was idle")
                    self._discard(worker)
                    worker = None
                worker = self._start()
            try:
                yield worker
            except EncoderDiedError as error:
                logger.error("kvcodec: %s; another one takes its place", error)
                self._discard(worker)
                worker = None
                raise
        finally:
            self._idle.put(worker)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EncoderDiedError("the encoder processes have been closed")

    def _start(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._workers.append(worker)
        if is_closed:
            worker.end()
            self._check_open()
        try:
            worker.wait_until_ready()
        except EncoderDiedError:
            self._discard(worker)
            raise
        return worker

    def _discard(self, worker: _Worker) -> None:
        with self._lock:
            if not self._is_closed:
                self._workers.remove(worker)
                metrics.ENCODER_PROCESSES_LOST.inc()
        worker.end()


class ProcessEncoder:
    """A ``PictureEncoder`` whose work is done by a pool of processes, with the bytes that ``SoftwareEncoder`` gives."""

    name = "x265"

    def __init__(self, processes: EncoderProcesses, uniform_blocks: bool) -> None:
        self._processes = processes
        self._uniform_blocks = uniform_blocks

    def encode(self, canvases: Canvases) -> EncodedPictures:
        """See ``EncoderProcesses.encode``."""
        return self._processes.encode(canvases, self._uniform_blocks)

    def close(self) -> None:
        """Nothing to release: the processes belong to the pool."""


class _Worker:
    """One process, the socket to it, and the memory that both see.

    Thread-safe: any thread may end it while another one has it encode. Neither descriptor is closed while anybody may
    use it, nor twice, because its number may be another file's by then.
    """

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        """Held while the descriptors are used, and to close them."""
        self._hang_up_lock = threading.Lock()
        """Held to hang up, which has to be possible amid a use, and to close."""
        self._is_closed = False
        self._connection, theirs = socket.socketpair()
        # Without a name: it is gone with the last process that holds it, however that ends.
        self._memory_fd = os.memfd_create("kvcodec-canvases")
        self._memory: mmap.mmap | None = None
        self._is_lost = False
        with theirs:
            descriptors = (theirs.fileno(), self._memory_fd)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *map(str, descriptors), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=child_environment(),
                # Ctrl-C in a terminal is for the server, which ends its workers itself.
                process_group=0,
            )

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._is_lost and self._process.poll() is None

    def wait_until_ready(self) -> None:
        with self._use():
            self._connection.settimeout(START_TIMEOUT_S)
            encoder_worker.receive(self._connection, encoder_worker.ANSWER.size)
            self._connection.settimeout(ENCODE_TIMEOUT_S)

    def encode(self, canvases: Canvases, uniform_blocks: bool) -> EncodedPictures:
        with self._use():
            shape = self._put(canvases)
            self._connection.sendall(encoder_worker.REQUEST.pack(*shape, uniform_blocks))
            return encoder_worker.receive_encoded(self._connection)

    def hang_up(self) -> None:
        """Has the process end; a thread that waits for it gets ``EncoderDiedError``."""
        self._is_lost = True
        with self._hang_up_lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Ends the process and waits until it is gone."""
        self.hang_up()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._in_use, self._hang_up_lock:
            if not self._is_closed:
                self._is_closed = True
                self._connection.close()
                os.close(self._memory_fd)

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """The descriptors stay open within; that the process has gone there is ``EncoderDiedError``."""
        try:
            with self._in_use:
                if self._is_lost:
                    raise EOFError("it has been ended")
                yield
        except (OSError, EOFError) as error:
            raise self._died(error) from error

    def _put(self, canvases: Canvases) -> tuple[int, ...]:
        """Copies canvases into the shared memory."""
        if self._memory is None or len(self._memory) < canvases.nbytes:
            os.ftruncate(self._memory_fd, canvases.nbytes)
            self._memory = mmap.mmap(self._memory_fd, canvases.nbytes)
        np.frombuffer(self._memory, np.uint8, canvases.nbytes).reshape(canvases.shape)[:] = canvases
        return canvases.shape

    def _died(self, error: Exception) -> EncoderDiedError:
        self._is_lost = True
        if isinstance(error, TimeoutError):
            self._process.kill()
            return EncoderDiedError(f"encoder process {self.process_id} hung and was killed")
        try:
            status = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return EncoderDiedError(f"encoder process {self.process_id} can't be reached: {error}")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return EncoderDiedError(f"encoder process {self.process_id} ended with {how}")
