"""One peer and two SGLang servers that share it, as processes, with a third that knows no kvcodec as the truth."""

import contextlib
import json
import pathlib
import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence

from sglang_kvcodec.config import parse_bytes
from sglang_kvcodec.format.exchange import PeerStat
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage import open_engine
from sglang_kvcodec.testing.clear_texts import clear_texts
from sglang_kvcodec.testing.conversation import definitions_of
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess, free_port
from sglang_kvcodec.testing.sglang_client import ChatReply

MODEL = str(pathlib.Path(__file__).parents[1] / "models" / "tiny-code-lm")
PAGE_TOKENS = 64
CAPACITY = "500MB"
ANSWER_TOKENS = 24
LONG_ANSWER_TOKENS = 2500
FAST_RETRY = "0.3"
MODULES = (
    *("argparse", "tarfile", "zipfile", "typing", "_pydecimal", "turtle", "doctest", "pydoc", "inspect"),
    *("subprocess", "pickletools", "mailbox", "optparse", "ssl", "difflib", "imaplib", "threading", "shutil"),
    *("pickle", "logging", "enum", "http.client", "unittest.mock", "urllib.request", "xml.etree.ElementTree"),
    *("datetime", "_pyio", "ipaddress", "xmlrpc.client", "configparser"),
)
TEXT_CHARACTERS = 2200
ENDINGS = (
    *("def close(self):", "class Error(Exception):", "return None", "import os, sys", "def __init__(self, name):"),
    *("for line in lines:", "raise ValueError", "if not self.closed:", "while True:", "def main():"),
    *("else:", "@property", "assert result == expected", "yield from", "with open(path) as file:", "# Check that"),
)
"""About every twelfth text has a clear answer; one with another ending takes no new prefill, and few more decode steps
where others are asked as well."""


class Cluster:
    """Owns the processes. Servers live as long as the test session, the peer comes and goes at one address."""

    def __init__(self, work_dir: pathlib.Path) -> None:
        self.work_dir = work_dir
        self.store_dir = work_dir / "store"
        self.peer_port = free_port()
        self.remote = f"grpc://127.0.0.1:{self.peer_port}"
        self.peer: PeerProcess | None = None
        self._stack = contextlib.ExitStack()
        self._texts = _texts()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.stop_peer()

    # ---- processes ----

    def start_server(
        self, name: str, kvcodec=True, profile="exact", plan="always", kvcodec_args=(), model: str = MODEL, **options
    ) -> SGLangProcess:
        """Starts an SGLang server; does not wait for it. ``options`` are those of ``SGLangProcess``."""
        server = SGLangProcess(
            name,
            model,
            self.work_dir / f"{name}.log",
            KVCodecArgs(self.remote, profile, tuple(kvcodec_args), plan) if kvcodec else None,
            **options,
        )
        # SGLang takes long to end when asked to.
        self._stack.callback(server.kill)
        return server

    def start_peer(
        self, bandwidth_limit: str | None = None, capacity: str = CAPACITY, arguments: Sequence[str] = ()
    ) -> None:
        """Starts the peer at its address."""
        self.peer = PeerProcess(f"lmdb:{self.store_dir}", capacity, self.peer_port, bandwidth_limit, arguments)

    def stop_peer(self) -> None:
        """SIGTERM, if it runs."""
        if self.peer is not None:
            if self.peer.alive:
                self.peer.terminate()
            self.peer = None

    def restart_peer(self, bandwidth_limit: str | None = None, capacity: str = CAPACITY) -> None:
        """Stops it and starts it with other arguments; the servers have noticed both."""
        self.stop_peer()
        for server in (self.a, self.b):
            wait_for(lambda s=server: metric(s, "kvcodec_peer_up") == 0, f"sign of the loss at {server.name}")
        self.start_peer(bandwidth_limit, capacity)
        for server in (self.a, self.b):
            wait_up(server)

    def stat(self) -> PeerStat:
        """What the peer says of itself."""
        peer = GrpcPeer(self.remote)
        try:
            return peer.stat()
        finally:
            peer.close()

    @contextlib.contextmanager
    def store(self):
        """The store's engine in this process, while the peer is down."""
        self.stop_peer()
        engine = open_engine(f"lmdb:{self.store_dir}", parse_bytes(CAPACITY))
        try:
            yield engine
        finally:
            engine.close()

    # ---- what a test does ----

    def text(self, pieces: int = 1) -> str:
        """Text that no test has used, of about 700 tokens a piece."""
        return "".join(next(self._texts) for _ in range(pieces))

    def clear_text(self, pieces: int = 1, after: str = "") -> tuple[str, str]:
        """Such a text, behind another one, to which the answer does not hang on rounding, and that answer."""

        def texts():
            while True:
                body = after + self.text(pieces)
                # Once, so that no two of those below compute the same prefix.
                self.plain.client.chat([{"role": "user", "content": body}], 1)
                yield from (body[: -len(ending) - 1] + "\n" + ending for ending in ENDINGS)

        return next(clear_texts(self.plain.client, texts(), ANSWER_TOKENS, at_once=len(ENDINGS)))


def _texts():
    for module in MODULES:
        text = definitions_of(module)
        for start in range(0, len(text) - TEXT_CHARACTERS, TEXT_CHARACTERS):
            yield text[start : start + TEXT_CHARACTERS]
    raise RuntimeError("no text is left")


def ask(server: SGLangProcess, text: str, **extra) -> ChatReply:
    """One greedy question."""
    return server.client.chat([{"role": "user", "content": text}], ANSWER_TOKENS, extra or None)


@contextlib.contextmanager
def others(server: SGLangProcess, text: str, answer: str) -> Iterator[None]:
    """Somebody is being answered at a server meanwhile; the words must begin as those of a server without kvcodec."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": LONG_ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    pieces: list[str] = []
    enough, ended = threading.Event(), threading.Event()

    def listen() -> None:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    pieces.extend(choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"])
                if enough.is_set():
                    return
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        wait_for(lambda: bool("".join(pieces)), "word of the answer to others")
        yield
        wait_for(lambda: len("".join(pieces)) >= len(answer), "first words of the answer to others")
        assert not ended.is_set(), "the others were through before they could be in the way"
    finally:
        enough.set()
        thread.join()
    assert "".join(pieces).startswith(answer)


def forget(server: SGLangProcess) -> None:
    """Makes a server forget all KV it holds, on the device and coded in host memory."""
    server.client.flush_cache()
    deadline = time.monotonic() + 30
    while True:
        request = urllib.request.Request(f"{server.url}/hicache/storage-backend/clear", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def metric(server: SGLangProcess, name: str, **labels: str) -> float:
    """Sum of a metric over all series with the given labels."""
    total = 0.0
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        for line in response.read().decode().splitlines():
            series, _, value = line.rpartition(" ")
            found = re.match(r"[^{ ]+", series)
            if found and found[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
    return total


def wait_for(condition, what: str, timeout_s: float = 60.0) -> None:
    """Polls until ``condition()``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


def wait_up(server: SGLangProcess) -> None:
    """Waits until the server has found its peer."""
    wait_for(lambda: metric(server, "kvcodec_peer_up") == 1, f"peer at {server.name}")
