"""What the benchmarks of real SGLang servers share: starting them, fresh prompts, forgetting, percentiles."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence

from sglang_kvcodec.testing.conversation import definitions_of
from sglang_kvcodec.testing.machine import gpu_names
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess, process_tree
from sglang_kvcodec.testing.sglang_client import ChatReply

TINY_MODEL = str(pathlib.Path(__file__).parents[1] / "tests/models/tiny-code-lm")
MODULES = (
    *("argparse", "inspect", "tarfile", "zipfile", "typing", "_pydecimal", "turtle", "doctest", "pydoc", "subprocess"),
    *("pickletools", "mailbox", "logging", "smtplib", "ssl", "optparse", "ftplib", "statistics", "pickle", "enum"),
    *("pathlib", "socket", "threading", "platform", "ipaddress", "http.client", "email.message", "unittest.mock"),
    *("difflib", "datetime", "imaplib", "dataclasses", "shutil", "locale", "configparser", "plistlib", "heapq"),
)
"""Source that is on every machine: enough for a prompt of its own in every round."""


def parser_of(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all these benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_MODEL, help="path or hub name; on CUDA if there is a GPU")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="two rounds, and keep no result: does it still run?")
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; from here on SIGTERM ends the benchmark and what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.dry = min(2, options.rounds), True
    return options


class Lab:
    """Owns the servers and the logs of one benchmark; a context manager that leaves no process behind."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        self.work_dir = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcodec-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_server(self, name: str, kvcodec: KVCodecArgs | None, among: int = 1) -> SGLangProcess:
        """Starts a server, one of ``among`` that share a GPU if there is one, and waits until it answers.

        One after the other: loading takes all cores, and a machine of few takes no shorter for several at once.
        """
        on_cpu = not gpu_names()
        server = self._stack.enter_context(
            SGLangProcess(
                name,
                self.model,
                self.work_dir / f"{name}.log",
                kvcodec,
                on_cpu=on_cpu,
                extra_args=() if on_cpu or among == 1 else ("--mem-fraction-static", f"{0.8 / among:.2f}"),
            )
        )
        server.wait_ready()
        print(f"{name} is up", flush=True)
        return server


def prompts(model: str, tokens: int) -> Iterator[str]:
    """Texts of about ``tokens`` tokens, none twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for module in MODULES:
        ids = tokenizer.encode(definitions_of(module), add_special_tokens=False)
        for start in range(0, len(ids) - tokens + 1, tokens):
            yield tokenizer.decode(ids[start : start + tokens])
    raise RuntimeError("no text is left: fewer rounds, or more modules")


def ask(server: SGLangProcess, text: str, max_tokens: int, ignore_eos: bool = False) -> ChatReply:
    extra = {"ignore_eos": True} if ignore_eos else None
    return server.client.chat([{"role": "user", "content": text}], max_tokens, extra)


def ask_all(server: SGLangProcess, texts: Sequence[str], max_tokens: int, at_once: int) -> float:
    """Output tokens per second over all ``texts``, ``at_once`` of them at any time."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda text: ask(server, text, max_tokens, ignore_eos=True), texts))
        elapsed_s = time.perf_counter() - started
    return sum(reply.completion_tokens for reply in replies) / elapsed_s


def forget(server: SGLangProcess) -> None:
    """Makes a server with kvcodec forget all KV that it holds, on the device and coded in host memory."""
    server.client.flush_cache()
    request = urllib.request.Request(f"{server.url}/hicache/storage-backend/clear", method="POST")

    def cleared() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=30):
                return True
        except OSError:
            return False

    wait_for(cleared, f"cleared host cache of {server.name}")


def wait_peer(server: SGLangProcess, up: bool) -> None:
    """Waits until the server has noticed that its peer is there, or gone."""
    wait_for(lambda: server.client.metrics().get("kvcodec_peer_up") == float(up), f"peer_up == {up:d} at {server.name}")


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s} s")
        time.sleep(0.05)


def rotated(items: Sequence, by: int) -> list:
    """``items`` from another start in every round, so that none always comes first."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, 10th and 90th percentile of ``values`` under names that begin with ``name``."""
    ranked = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {
        f"{name}_median": round(statistics.median(values), digits),
        f"{name}_p10": round(ranked[0], digits),
        f"{name}_p90": round(ranked[-1], digits),
    }


def cpu_s(server: SGLangProcess) -> float:
    """CPU time that all processes of a server have taken: what other work on the machine hardly changes."""
    total = 0.0
    for pid in process_tree(server.pid):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def load_average() -> float:
    return round(os.getloadavg()[0], 2)
