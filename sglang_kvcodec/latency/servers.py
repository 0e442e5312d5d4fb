"""The processes of a measurement: SGLang servers, and a peer whose bandwidth changes."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Self

from sglang_kvcodec.config import Timeouts, parse_bits_per_s
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.machine import gpu_names
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess, free_port
from sglang_kvcodec.testing.sglang_client import SGLangClient

UNLIMITED = "unlimited"
"""The bandwidth of a peer that nothing bounds."""
_START_TIMEOUT_S = 1800.0
_GPU_SHARE = 0.8
"""Of a GPU's memory, for all servers on it together."""


def bits_per_s_of(bandwidth: str) -> float | None:
    """What a bandwidth is in bits per second, None for ``"unlimited"``.

    Raises:
        ConfigurationError: not a bandwidth.
    """
    return None if bandwidth == UNLIMITED else parse_bits_per_s(bandwidth)


class Lab:
    """Owns the servers and the logs of a measurement; a context manager that leaves no process behind."""

    def __init__(
        self,
        model: str,
        work_dir: pathlib.Path | None = None,
        server_args: Sequence[str] = (),
        say: Callable[[str], object] = print,
    ) -> None:
        """Starts nothing yet.

        Args:
            model: path or hub name.
            work_dir: for logs, the caller's to remove; by default one that goes with the lab.
            server_args: more arguments for every server.
            say: is told what is up.
        """
        self.model = model
        self._work_dir = work_dir
        self._server_args = tuple(server_args)
        self._say = say
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.work_dir = self._work_dir or pathlib.Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcodec-bench-"))
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_server(self, name: str, kvcodec: KVCodecArgs | None, among: int = 1) -> SGLangProcess:
        """Starts a server, one of ``among`` that share a GPU if there is one, and waits until it answers.

        One after the other: loading takes all cores, and a machine of few takes no shorter for several at once.

        Raises:
            ProcessError: it did not start; with the end of its log.
        """
        on_cpu = not gpu_names()
        share = () if on_cpu or among == 1 else ("--mem-fraction-static", f"{_GPU_SHARE / among:.2f}")
        began_s = time.monotonic()
        server = self._stack.enter_context(
            SGLangProcess(
                name,
                self.model,
                self.work_dir / f"{name}.log",
                kvcodec,
                on_cpu=on_cpu,
                extra_args=(*share, *self._server_args),
            )
        )
        server.wait_ready(_START_TIMEOUT_S)
        self._say(f"{name} is up after {time.monotonic() - began_s:.0f} s")
        return server


class ShapedPeer:
    """A peer at one address on one store, started anew for every bandwidth. A context manager that stops it.

    The bandwidth is that of ``kvcodec serve --bandwidth-limit``: a token bucket that shapes what Fetch sends, and adds
    no latency.
    """

    def __init__(self, store_dir: pathlib.Path, capacity: str = "4GB") -> None:
        """Starts nothing yet.

        Args:
            store_dir: of its LMDB.
            capacity: of the store.
        """
        self._store = f"lmdb:{store_dir}"
        self._capacity = capacity
        self._port = free_port()
        self.remote = f"grpc://127.0.0.1:{self._port}"
        """What ``--kvcodec-remote`` takes."""
        self._process: PeerProcess | None = None

    def start(self, bandwidth: str, clients: Sequence[SGLangClient] = ()) -> None:
        """Starts it with another bandwidth; ``clients`` have noticed both its end and its start.

        Raises:
            RuntimeError: it did not come up.
            TimeoutError: a server did not notice.
        """
        self.stop()
        for client in clients:
            wait_peer(client, up=False)
        limit = None if bandwidth == UNLIMITED else bandwidth
        self._process = PeerProcess(self._store, self._capacity, self._port, limit, ("--log-level", "warning"))
        for client in clients:
            wait_peer(client, up=True)

    def put_calibrations(self, artifacts: Sequence[bytes]) -> None:
        """Stores calibrations, so that servers started from now on code with them.

        Args:
            artifacts: files of ``kvcodec calibrate``, one of each rank.

        Raises:
            FormatError: not a calibration.
            PeerError: the peer does not take it.
        """
        with contextlib.closing(GrpcPeer(self.remote, Timeouts(connect_s=5.0))) as peer:
            for artifact in artifacts:
                peer.put_calibration(Calibration.from_bytes(artifact).model_digest, artifact)

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self._process.terminate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_peer(client: SGLangClient, up: bool) -> None:
    """Waits until a server has noticed that its peer is there, or gone.

    Raises:
        TimeoutError: it did not.
    """
    wait_for(
        lambda: client.metrics().get("kvcodec_peer_up") == float(up),
        f"sign of the peer's {'start' if up else 'end'} at {client.base_url}",
    )


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Polls until ``condition()``.

    Raises:
        TimeoutError: no ``what`` in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s} s")
        time.sleep(0.05)
