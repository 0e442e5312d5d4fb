"""Processes for tests and the demo: nothing is left behind, and a failure shows the log."""

import contextlib
import os
import pathlib
import signal
import socket
import sys
import time

import pytest

from sglang_kvcodec.testing import processes
from sglang_kvcodec.testing.processes import KVCodecArgs, ManagedProcess, ProcessError, SGLangProcess, free_port

SLEEP = "import time; time.sleep(600)"
FAMILY = f"""
import subprocess, sys
children = [
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}]),
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True),
]
print(*[child.pid for child in children], flush=True)
children[0].wait()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True);" + FAMILY


def start(tmp_path: pathlib.Path, program: str) -> ManagedProcess:
    return ManagedProcess("child", [sys.executable, "-c", program], tmp_path / "child.log")


def first_numbers(process: ManagedProcess) -> list[int]:
    """The numbers of the first line that holds some, once it is whole."""
    while True:
        for line in process.log_text().splitlines(keepends=True):
            if line.endswith("\n") and line[0].isdigit():
                return [int(word) for word in line.split()]
        process.check_alive()
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("program", [FAMILY, STUBBORN], ids=["plain", "stubborn"])
@pytest.mark.parametrize("end", ["close", "kill", "error"])
def test_nothing_is_left_behind(tmp_path, program, end):
    with pytest.raises(ZeroDivisionError) if end == "error" else contextlib.nullcontext():
        process = start(tmp_path, program)
        children = first_numbers(process)
        assert all(map(runs, children))
        if end == "close":
            process.close(grace_s=0.5)
            process.close()
        elif end == "kill":
            process.kill()
        else:
            with process:
                raise ZeroDivisionError
    assert not process.alive
    assert not any(map(runs, [process.pid, *children]))


def test_a_process_ends_when_its_parent_is_killed(tmp_path):
    program = f"""
import pathlib, sys
from sglang_kvcodec.testing.processes import ManagedProcess
log_path = pathlib.Path({str(tmp_path)!r}, "grandchild.log")
child = ManagedProcess("grandchild", [sys.executable, "-c", {SLEEP!r}], log_path)
print(child.pid, flush=True)
child.wait(600)
"""
    with start(tmp_path, program) as parent:
        (grandchild,) = first_numbers(parent)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        deadline = time.monotonic() + 30
        while runs(grandchild) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not runs(grandchild)


def test_a_process_that_ended_shows_its_log(tmp_path):
    with start(tmp_path, "print('all is lost'); raise SystemExit(3)") as process:
        assert process.wait(30) == 3
        with pytest.raises(ProcessError, match=r"child ended with 3; (?s:.*)all is lost"):
            process.check_alive()


def test_a_server_that_never_answers_is_an_error(tmp_path):
    with (
        SGLangProcess("server", "no-model", tmp_path / "server.log", launcher=["/bin/false"]) as server,
        pytest.raises(ProcessError, match="server ended with 1"),
    ):
        server.wait_ready(30)


def test_free_ports_are_none_that_the_kernel_gives_to_others():
    first_ephemeral = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < first_ephemeral for port in ports)


def test_where_the_kernel_gives_all_ports_a_free_port_is_one_of_these(tmp_path, monkeypatch):
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(processes, "_PORT_RANGE_FILE", tmp_path / "range")
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_kvcodec_flags():
    args = KVCodecArgs("grpc://127.0.0.1:1", "raw", ("--kvcodec-read-only", "true")).to_args()
    assert " ".join(args) == (
        "--enable-kvcodec --kvcodec-remote grpc://127.0.0.1:1 --kvcodec-profile raw --kvcodec-plan always "
        "--kvcodec-read-only true"
    )
