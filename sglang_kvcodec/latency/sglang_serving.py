"""SGLang's own load generator, ``python -m sglang.benchmark.serving``, as a process.

Its data set ``generated-shared-prefix`` is made of random tokens of the model's tokenizer, so nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

from sglang_kvcodec.latency.loads import Load
from sglang_kvcodec.testing.processes import ManagedProcess

PROMPTS_PER_GROUP = 2
"""Of one prefix each: the first finds it at the peer, or nowhere, the second in the server's pool."""
_QUESTION_TOKENS = 32
_TIMEOUT_S = 3600.0
_FIGURES = (
    *("completed", "duration", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"),
    *("request_throughput", "input_throughput", "output_throughput", "total_throughput"),
)
_NAMES = {
    "duration": "duration_s",
    "request_throughput": "requests_per_s",
    "input_throughput": "input_tokens_per_s",
    "output_throughput": "output_tokens_per_s",
    "total_throughput": "tokens_per_s",
}


@dataclasses.dataclass(frozen=True)
class ServingLoad:
    """What the generator sends.

    Attributes:
        tokenizer: path or hub name of the model, whose tokenizer makes the prompts.
        load: length of prefix and answers, and turns where it is a conversation.
        prefixes: how many; each has two prompts.
        concurrency: requests at once.
        seed: the same one gives the same prompts.
    """

    tokenizer: str
    load: Load
    prefixes: int
    concurrency: int
    seed: int = 1

    def arguments(self, base_url: str, output: pathlib.Path) -> list[str]:
        """Of the generator."""
        turns = self.load.turns if self.load.kind == "multi-turn" else 1
        prompts = self.prefixes * PROMPTS_PER_GROUP
        return [
            *("--backend", "sglang-oai-chat", "--base-url", base_url, "--ready-check-timeout-sec", "0"),
            *("--model", self.tokenizer, "--tokenizer", self.tokenizer, "--seed", str(self.seed)),
            *("--dataset-name", "generated-shared-prefix", "--num-prompts", str(prompts)),
            *("--gsp-num-groups", str(self.prefixes), "--gsp-prompts-per-group", str(PROMPTS_PER_GROUP)),
            *("--gsp-system-prompt-len", str(self.load.prefix_tokens), "--gsp-question-len", str(_QUESTION_TOKENS)),
            *("--gsp-output-len", str(self.load.answer_tokens), "--gsp-num-turns", str(turns)),
            # Otherwise prompts are kept in the home directory, under a name that says nothing of the tokenizer.
            "--gsp-send-routing-key",
            # Warming up would bring the first prefix into the server's pool.
            *("--warmup-requests", "0", "--max-concurrency", str(self.concurrency)),
            *("--disable-tqdm", "--cache-report", "--output-file", str(output)),
        ]


def run_serving(load: ServingLoad, base_url: str, name: str, work_dir: pathlib.Path) -> dict[str, Any]:
    """Sends the load to a server; its figures, times of first tokens in milliseconds.

    Args:
        load: what is sent.
        base_url: of the server.
        name: of the run, for its log.
        work_dir: for the log and the generator's output.

    Raises:
        ProcessError: the generator failed, or a request did; with the end of its log.
    """
    output = work_dir / f"{name}.jsonl"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang.benchmark.serving", *load.arguments(base_url, output)]
    with ManagedProcess(name, command, work_dir / f"{name}.log") as process:
        status = process.wait(_TIMEOUT_S)
        if status or not output.exists():
            raise process.error(f"ended with {status}")
        result = json.loads(output.read_text().splitlines()[-1])
        wanted = load.prefixes * PROMPTS_PER_GROUP
        if result.get("completed", 0) < wanted:
            raise process.error(f"completed {result.get('completed', 0)} of at least {wanted} requests")
    figures = {_NAMES.get(name, name): _rounded(result[name]) for name in _FIGURES}
    report = result.get("cache_report") or {}
    for tier in ("device", "host", "storage"):
        figures[f"cached_{tier}_tokens"] = report.get(f"{tier}_cached_tokens") or 0
    return figures


def _rounded(value: float) -> float:
    return round(value, 3)
