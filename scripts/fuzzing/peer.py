"""Every RPC of a real ``kvcodec serve``: whatever is sent, it lives, answers in typed words and keeps what it has."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import socket
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import hypothesis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings

from fuzzing.calls import METHODS, Call, Known, calls
from fuzzing.mutations import mutants
from fuzzing.run_parser import Outcome
from fuzzing.target import require
from sglang_kvcodec.config import Access, Timeouts
from sglang_kvcodec.format.exchange import FetchedHeader, PutOutcome
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.limits import GRPC_MESSAGE_BYTES
from sglang_kvcodec.rpc.tokens import TokenEntry, append_entry
from sglang_kvcodec.testing.peer import PeerProcess

RSS_LIMIT_MB = 512
"""Of the peer. It may hold two of the largest objects as they arrive; nothing here sends so much."""
_PATIENT = Timeouts(connect_s=30, lookup_s=30, progress_s=30, fetch_s=60, put_s=60)
_CALL_S = 30.0
_CALLS_PER_CHECK = 100
_MOST_FINDINGS = 5
_CALLERS = 4
_SEEDS_OF_A_CALLER = 1_000_000
_SAY_EVERY_S = 10.0
_ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}
_OPTIONS = [("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
FRAMES = (
    _HTTP2,
    _HTTP2 + bytes((0, 0, 5, 1, 4, 0, 0, 0, 1)) + b"\x82\x86\x84\x41\x01",
    _HTTP2 + bytes((0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 255, 255)) + bytes((0, 0, 3, 0, 0, 0, 0, 0, 7)) + b"abc",
    b"GET / HTTP/1.1\r\nHost: peer\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(509),
)
"""What a connection may begin with."""


class FuzzedPeer:
    """A peer with pages and a calibration that must stay, and whoever calls it. Use it as a context manager."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Starts it, with its store, its tokens and what it says in ``directory``."""
        self.known = Known.golden()
        self.statuses: Counter[tuple[str, str]] = Counter()
        """Method and status -> how often."""
        self.peak_rss_mb = 0.0
        self.made = 0
        self._words = directory / "stderr"
        tokens = directory / "tokens.toml"
        for name, scopes, tenant in (
            ("all", "read,write,admin", ""),
            ("tenant", "read,write,admin", "t"),
            ("reader", "read", ""),
        ):
            digest = hashlib.sha256(f"token-of-{name}".encode()).digest()
            append_entry(tokens, TokenEntry(name, digest, frozenset(scopes.split(",")), tenant=tenant))
        token_file = directory / "all.token"
        token_file.write_text("token-of-all")
        self.tokens = (
            *["token-of-all"] * 6,
            "token-of-tenant",
            "token-of-tenant",
            "token-of-reader",
            "token-of-nobody",
            "",
        )
        self._stack = contextlib.ExitStack()
        arguments = ["--tokens", str(tokens), "--metrics-port", "0", "--log-level", "warning"]
        with _stderr_in(self._words):
            store = f"lmdb:{directory}/store"
            self.process = self._stack.enter_context(PeerProcess(store, "1GiB", arguments=arguments))
        access = Access(token_file=str(token_file))
        self._client = GrpcPeer(self.process.remote, _PATIENT, access=access)
        self._stack.callback(self._client.close)
        self._channel = self._stack.enter_context(grpc.insecure_channel(self.process.address, options=_OPTIONS))
        self._paths = {f"/{method.containing_service.full_name}/{method.name}": method.name for method in METHODS}
        self._put(self.known.kept)
        self._client.put_calibration(bytes(32), self.known.artifacts[0])

    def __enter__(self) -> FuzzedPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, call: Call) -> None:
        """Makes a call, and checks everything now and then.

        Raises:
            FindingError: a status that no client should see, or what :meth:`check` finds.
        """
        self.made += 1
        status, details = self._status_of(call)
        name = self._paths.get(call.path, "a method there is not")
        self.statuses[name, status.name] += 1
        allowed = _ALLOWED if call.path in self._paths else {grpc.StatusCode.UNIMPLEMENTED}
        if call.answers_read is not None:
            allowed = allowed | {grpc.StatusCode.CANCELLED}
        require(status in allowed, f"{status.name} ({details}) for {call!r}")
        require(bool(details) or status in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED), f"no words for {call!r}")
        if self.made % _CALLS_PER_CHECK == 0:
            self.check()

    def send(self, data: bytes) -> None:
        """Sends bytes that need not be HTTP/2 over a connection of their own."""
        self.made += 1
        host, _, port = self.process.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.settimeout(0.05)
            # The peer may close it at any byte, or wait for more.
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.recv(65_536)

    def check(self) -> None:
        """Whether the peer is as it should be.

        Raises:
            FindingError: it has ended or grown, is not healthy, has lost or changed what must stay, or has met an
                error that it does not know.
        """
        require(self.process.alive, f"the peer has ended: {self._said()}")
        rss_mb = _rss_mb(self.process.pid)
        self.peak_rss_mb = max(self.peak_rss_mb, rss_mb)
        require(rss_mb < RSS_LIMIT_MB, f"the peer takes {rss_mb:.0f} MiB")
        health = health_pb2_grpc.HealthStub(self._channel)
        for service in ("", "sglang_kvcodec.rpc.Peer"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_CALL_S)
            require(answer.status == health_pb2.HealthCheckResponse.SERVING, f"{service!r} is not serving")
        self._check_kept()
        metrics = self._metrics()
        bad = re.findall(
            r'kvcodec_peer_rpcs_total\{method="\w+",status="(?:UNAVAILABLE|UNKNOWN|INTERNAL)"\} .*', metrics
        )
        require(not bad, f"{bad}: {self._said()}")
        require("Traceback" not in self._said(), self._said())

    def _check_kept(self) -> None:
        for data in self.known.kept:
            key = PageObject(data).header.key
            found = bytearray(len(data))
            for event in self._client.fetch(key.namespace_digest, [key.page_hash]):
                require(hasattr(event, "header") or hasattr(event, "data"), f"page {key} is missing")
                if isinstance(event, FetchedHeader):
                    found[: len(event.header)] = event.header
                else:
                    found[event.offset : event.offset + len(event.data)] = event.data
            require(found == data, f"page {key} is another")
        artifact = self.known.artifacts[0]
        require(
            self._client.get_calibration(bytes(32), hashlib.sha256(artifact).digest()) == artifact,
            "the calibration is missing",
        )

    def _put(self, objects: tuple[bytes, ...]) -> None:
        for data in objects:
            key = PageObject(data).header.key
            (result,) = self._client.put(key.namespace_digest, [(key.page_hash, data)])
            require(result.outcome is PutOutcome.STORED, f"{result}")

    def _status_of(self, call: Call) -> tuple[grpc.StatusCode, str]:
        metadata = (("authorization", f"Bearer {call.token}"),) if call.token else ()
        method = self._channel.stream_stream(call.path)
        answers = method(iter(call.sent), timeout=_CALL_S, metadata=metadata)
        try:
            for number, _ in enumerate(answers):
                if number == call.answers_read:
                    answers.cancel()
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        return answers.code(), answers.details() or ""

    def _metrics(self) -> str:
        address = self.process.ready_line.rpartition("metrics=")[2]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_CALL_S) as response:
            return str(response.read().decode())

    def _said(self) -> str:
        return self._words.read_text(errors="replace")[-4000:]


def run_peer(seconds: float, seed: int, say: Callable[[str], None]) -> Outcome:
    """Calls of every RPC for a given time, several at once."""
    outcome = Outcome("peer", f"Hypothesis, {_CALLERS} callers, seed {seed}", 0, 0.0, 0.0, None, [])
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, FuzzedPeer(pathlib.Path(directory)) as peer:
        arguments = [(peer, seed + number * _SEEDS_OF_A_CALLER, started_s + seconds) for number in range(_CALLERS)]
        with concurrent.futures.ThreadPoolExecutor(_CALLERS) as callers:
            calling = [callers.submit(_call_until, *each, outcome.findings) for each in arguments]
            while concurrent.futures.wait(calling, _SAY_EVERY_S).not_done:
                say(f"peer: {peer.made} calls, {peer.peak_rss_mb:.0f} MiB, {len(outcome.findings)} findings")
        if peer.process.alive:
            outcome.findings += _finding_of(peer.check)
        outcome.executions, outcome.peak_rss_mb = peer.made, peer.peak_rss_mb
        say(f"peer: {_table(peer.statuses)}")
    outcome.seconds = time.monotonic() - started_s
    return outcome


def _call_until(peer: FuzzedPeer, seed: int, until_s: float, findings: list[str]) -> None:
    """Calls and connections of one caller, until the time or the peer has ended, or there are enough findings."""
    frames = mutants(FRAMES, seed)
    while time.monotonic() < until_s and len(findings) < _MOST_FINDINGS and peer.process.alive:
        seed += 1
        findings += _finding_of(lambda: _make_some(peer, seed, until_s))  # noqa: B023  (called at once)
        findings += _finding_of(lambda: peer.send(next(frames)))


def _finding_of(work: Callable[[], None]) -> list[str]:
    try:
        work()
    except Exception as error:  # whatever it is, it is a finding
        return [f"{type(error).__name__}: {error}"]
    return []


def _make_some(peer: FuzzedPeer, seed: int, until_s: float) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        # Nothing is made smaller: what a call meets depends on those before it.
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(peer.known, peer.tokens))
    def make(call: Call) -> None:
        if time.monotonic() < until_s:
            peer.make(call)

    make()


def _table(statuses: Counter[tuple[str, str]]) -> str:
    methods = sorted({method for method, _ in statuses})
    return "; ".join(
        f"{method} "
        + " ".join(f"{status} {count}" for (each, status), count in sorted(statuses.items()) if each == method)
        for method in methods
    )


def _rss_mb(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    require(match is not None, "the peer has ended")
    assert match is not None
    return int(match[1]) / 1024


@contextlib.contextmanager
def _stderr_in(path: pathlib.Path) -> Iterator[None]:
    """What is started in the block writes its errors there."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
