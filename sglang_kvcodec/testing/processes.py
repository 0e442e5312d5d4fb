"""SGLang servers as processes of their own: for the demo, the integration tests and the benchmarks.

Standard library only: SGLang is not imported here, it runs in the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from sglang_kvcodec.testing.sglang_client import SGLangClient

_POLL_S = 0.1
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
parent, *command = sys.argv[1:]
if os.getppid() != int(parent):
    sys.exit("whoever started this has ended")
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
"""
"""Becomes another program that ends with whoever started it. Not a ``preexec_fn``: that would run in a fork of a
process whose gRPC threads are gone, and gRPC aborts there now and then."""

CPU_ENV = {"SGLANG_PLATFORM": "kvcodec_cpu", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""What lets stock SGLang run without a GPU, together with :data:`CPU_ARGS`.

Several servers share few cores here: threads that spin while they wait would take them from each other.
"""
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--max-total-tokens", "20000", "--mem-fraction-static", "0.3"),
    # An idle scheduler would otherwise take a core from the servers that do work.
    "--sleep-on-idle",
)


class ProcessError(RuntimeError):
    """A process ended, or was not ready in time. The message holds the end of its log."""


_LOWEST_PORT = 10240
_PORT_RANGE_FILE = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
_given_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now, and none that it gave before.

    It is below those that the kernel gives to connections and to servers that ask for any (``ip_local_port_range``): a
    server that takes ten seconds to load would find one of these taken now and then. Where there are none below, one
    of these it is.
    """
    first_ephemeral = 0
    with contextlib.suppress(OSError):
        first_ephemeral = int(_PORT_RANGE_FILE.read_text().split()[0])
    for _ in range(100):
        # SGLang takes another port up to 1000 above its own: those at random are seldom neighbours.
        port = random.randrange(_LOWEST_PORT, first_ephemeral) if first_ephemeral > _LOWEST_PORT else 0
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            port = int(probe.getsockname()[1])
            if port not in _given_ports:
                _given_ports.add(port)
                return port
    raise ProcessError("no free port on 127.0.0.1")


class ManagedProcess:
    """A process in a session of its own, with its output in a file. ``close`` ends it and everything it started.

    It also gets SIGTERM when the thread that started it ends, however that comes about.
    """

    def __init__(
        self, name: str, command: Sequence[str], log_path: pathlib.Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Its process id, which is also the id of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def log_text(self) -> str:
        """All it has printed."""
        return self.log_path.read_text(errors="replace")

    def check_alive(self) -> None:
        """Raises ``ProcessError`` if it has ended."""
        if not self.alive:
            raise self.error(f"ended with {self._process.returncode}")

    def error(self, what: str) -> ProcessError:
        """An error that tells ``what`` and shows the end of the log."""
        tail = "\n".join(line[:400] for line in self.log_text().splitlines()[-25:])
        return ProcessError(f"{self.name} {what}; the end of {self.log_path}:\n{tail}")

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status.

        Raises:
            ProcessError: it still runs after ``timeout_s``.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.error(f"still runs after {timeout_s} s") from None

    def kill(self) -> None:
        """Ends it and everything it started at once, as a crash would."""
        family = [self.pid, *_descendants(self.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        _wait_gone(family)

    def close(self, grace_s: float = 10.0) -> None:
        """Asks it to end, then makes it end. May be called twice."""
        family = [self.pid, *_descendants(self.pid)] if self.alive else []
        if self.alive:
            self.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        # The group's id is not given out anew while a process of the group is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        _wait_gone(family)


def process_tree(pid: int) -> list[int]:
    """Ids of a process and of all below it that run."""
    return [each for each in (pid, *_descendants(pid)) if _runs(each)]


def _descendants(pid: int) -> list[int]:
    """Ids of all processes below ``pid``, those in other sessions included."""
    children: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid …, where the name may hold anything
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        queue[:0] = below = children.get(queue.pop(), [])
        found += below
    return found


def _wait_gone(pids: Sequence[int], timeout_s: float = 10.0) -> None:
    """Waits until killed processes are gone or zombies that someone else has to reap."""
    deadline = time.monotonic() + timeout_s
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise ProcessError(f"processes {[pid for pid in pids if _runs(pid)]} can't be ended")
        time.sleep(_POLL_S)


def _runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class KVCodecArgs:
    """The kvcodec flags of an SGLang server; one that takes every hit, unless ``plan`` says otherwise."""

    remote: str
    profile: str = "exact"
    extra_args: tuple[str, ...] = ()
    plan: str = "always"

    def to_args(self) -> tuple[str, ...]:
        """As SGLang's command line takes them."""
        return (
            *("--enable-kvcodec", "--kvcodec-remote", self.remote, "--kvcodec-profile", self.profile),
            *("--kvcodec-plan", self.plan),
            *self.extra_args,
        )


class SGLangProcess(ManagedProcess):
    """An SGLang server as a process, without kvcodec if ``kvcodec`` is None."""

    def __init__(
        self,
        name: str,
        model: str,
        log_path: pathlib.Path,
        kvcodec: KVCodecArgs | None = None,
        on_cpu: bool = True,
        page_tokens: int = 64,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [
            *(*launcher, "--model-path", model),
            *("--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--page-size", str(page_tokens)),
            *("--enable-metrics", "--skip-server-warmup"),
            *(CPU_ARGS if on_cpu else ()),
            *(kvcodec.to_args() if kvcodec else ()),
            *extra_args,
        ]
        super().__init__(name, command, log_path, {**(CPU_ENV if on_cpu else {}), **(env or {})})
        self.client = SGLangClient(self.url)

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Waits until it answers.

        Raises:
            ProcessError: it ended, or does not answer after ``timeout_s``.
        """
        for _ in _until(time.monotonic() + timeout_s):
            if self.client.is_healthy():
                return
            self.check_alive()
        raise self.error(f"is not ready after {timeout_s} s")


def _until(deadline: float) -> Iterator[None]:
    yield
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        yield
