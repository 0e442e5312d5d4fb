"""What the benchmarks of real SGLang servers share beside ``sglang_kvcodec.latency``: options, questions, CPU time."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Iterator, Sequence

from sglang_kvcodec.latency.texts import fresh_texts
from sglang_kvcodec.testing.processes import SGLangProcess, process_tree
from sglang_kvcodec.testing.sglang_client import ChatReply

TINY_MODEL = str(pathlib.Path(__file__).parents[1] / "tests/models/tiny-code-lm")


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


def prompts(model: str, tokens: int) -> Iterator[str]:
    """Texts of about ``tokens`` tokens, none twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return fresh_texts(lambda text: len(tokenizer.encode(text, add_special_tokens=False)), tokens)


class Places:
    """Which CPUs what has: all share them, or a server's model has the first and all else, kvcodec too, the others.

    The latter is as on a GPU, whose video engines take nothing of what the model computes on.
    """

    def __init__(self, are_separate: bool) -> None:
        every = sorted(os.sched_getaffinity(0))
        self.model, self.others = (every[:1], every[1:]) if are_separate else (every, every)
        if not self.others:
            raise SystemExit("there is one CPU only")
        self.server_args = (
            ("--kvcodec-cpus", ",".join(map(str, self.others)), "--kvcodec-decode-threads", str(len(self.others)))
            if are_separate
            else ()
        )
        os.sched_setaffinity(0, self.others)

    @contextlib.contextmanager
    def of_the_model(self) -> Iterator[None]:
        """What is started inside has the model's CPUs."""
        os.sched_setaffinity(0, self.model)
        try:
            yield
        finally:
            os.sched_setaffinity(0, self.others)

    def row(self) -> dict[str, list[int]]:
        return {"cpus_of_the_model": self.model, "cpus_of_kvcodec_and_peer": self.others}


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


def cpu_s(server: SGLangProcess) -> float:
    """CPU time that all processes of a server have taken: what other work on the machine hardly changes."""
    total = 0.0
    for pid in process_tree(server.pid):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def over(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios of the rounds."""
    return round(statistics.median(a / b for a, b in zip(values, baseline, strict=True)), 3)


def load_average() -> float:
    return round(os.getloadavg()[0], 2)
