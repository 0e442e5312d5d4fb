"""A real ``kvcodec serve`` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

_READY = re.compile(r"kvcodec peer ready on (\S+:\d+) .*")
_EXIT_TIMEOUT_S = 60.0


class PeerProcess:
    """Starts a peer and waits until it serves; a context manager that leaves no process behind."""

    def __init__(
        self,
        store: str = "memory:",
        capacity: str = "1GiB",
        port: int = 0,
        bandwidth_limit: str | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """Starts ``kvcodec serve`` on loopback.

        Args:
            store: ``memory:`` or ``lmdb:DIR``.
            capacity: of the store.
            port: 0 takes a free one, which :meth:`restart` keeps.
            bandwidth_limit: of its fetches, e.g. ``"100Mbps"``.
            arguments: more of ``kvcodec serve``'s.

        Raises:
            RuntimeError: it did not come up; with its exit status.
        """
        self._arguments = ["--store", store, "--capacity", capacity, *arguments]
        if bandwidth_limit is not None:
            self._arguments += ["--bandwidth-limit", bandwidth_limit]
        self._start(f"127.0.0.1:{port}")

    def _start(self, listen: str) -> None:
        command = [sys.executable, "-m", "sglang_kvcodec.cli.main", "serve", "--listen", listen, *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        try:
            self.ready_line = self._process.stdout.readline().strip()
        except BaseException:
            # Interrupted: nobody else knows of the process yet.
            self.kill()
            raise
        match = _READY.fullmatch(self.ready_line)
        if match is None:
            self.kill()
            raise RuntimeError(f"the peer did not come up: exit status {self._process.returncode}")
        self.address = match[1]

    @property
    def remote(self) -> str:
        """What ``--kvcodec-remote`` takes."""
        scheme = "grpcs" if "--tls-cert" in self._arguments else "grpc"
        return f"{scheme}://{self.address}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def hang_up(self) -> None:
        """SIGHUP: it reads its settings and its tokens again."""
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL: what a crash or the end of the machine looks like."""
        self._process.kill()
        self._wait()

    def signal_stop(self) -> None:
        """SIGTERM, without waiting."""
        self._process.terminate()

    def wait(self) -> int:
        """Waits for its end; its exit status."""
        return self._wait()

    def terminate(self) -> int:
        """SIGTERM and wait; its exit status."""
        self.signal_stop()
        return self._wait()

    def restart(self) -> None:
        """Starts it again with the same arguments on the same port, after :meth:`kill` or :meth:`terminate`."""
        self._start(self.address)

    def _wait(self) -> int:
        status = self._process.wait(timeout=_EXIT_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
