"""One parser for a given time, in a process of its own, and what came of it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

from fuzzing.mutations import mutants
from fuzzing.parsers import load

RSS_LIMIT_MB = 2048
"""Of the process, torch and decoder included: one that takes more is a finding."""
_GROWTH_LIMIT_MB = 128
"""Of the memory of a process that has seen its first inputs."""
_INPUTS_PER_LOOK = 5000
_HANG_S = 300
"""By the clock on the wall, which other work stretches; ``coverage_guided`` has a bound on the CPU time of an input."""
_ROUND_S = 120.0
_SAY_EVERY_S = 10.0
_STATUS = re.compile(r"#(\d+).* cov: (\d+) ft: (\d+) .*rss: (\d+)Mb")
_FINAL = re.compile(r"stat::(number_of_executed_units|peak_rss_mb): +(\d+)")


@dataclasses.dataclass
class Outcome:
    """What came of a run.

    Attributes:
        target: what was fuzzed.
        engine: what made the inputs.
        executions: inputs, or calls.
        seconds: that it ran.
        peak_rss_mb: of the process that was fuzzed, in MiB.
        edges: of the control flow that were reached, by atheris's count; None where nothing counts them.
        findings: in words, each with the file that has the input, where there is one.
    """

    target: str
    engine: str
    executions: int
    seconds: float
    peak_rss_mb: float
    edges: int | None
    findings: list[str]


def run_with_atheris(name: str, seconds: float, directory: pathlib.Path, say: Callable[[str], None]) -> Outcome:
    """Until the time is over, or the first finding. The corpus in ``directory`` grows, and is taken up again.

    In rounds, each a process of its own: one that atheris looks into grows with its inputs, by a few KiB each where
    there is torch, though what it looks into does not. So the bound on memory stays one on what an input may take.
    """
    corpus, found = directory / "corpus" / name, directory / "findings" / name
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    outcome = Outcome(name, "atheris", 0, 0.0, 0.0, 0, [])
    started_s = time.monotonic()
    while not outcome.findings and (left_s := seconds - outcome.seconds) >= 1:
        command = [sys.executable, "-m", "fuzzing.coverage_guided", name, str(corpus)]
        command += [f"-max_total_time={int(min(left_s, _ROUND_S))}", "-print_final_stats=1", "-detect_leaks=0"]
        command += [f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={_HANG_S}", f"-report_slow_units={_HANG_S}"]
        command += [f"-artifact_prefix={found}/"]
        status, words = _run_round(command, outcome, say)
        outcome.seconds = time.monotonic() - started_s
        outcome.findings = [f"{name}: {path}" for path in sorted(set(found.iterdir()) - before)]
        if status and not outcome.findings:
            outcome.findings = [f"{name}: ended with {status}"]
        if outcome.findings:
            say("\n".join(words))
    return outcome


def _run_round(command: list[str], outcome: Outcome, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Adds to ``outcome``; the exit status and the last words."""
    words: list[str] = []
    said_s = time.monotonic()
    executions = 0
    with subprocess.Popen(
        command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if status := _STATUS.match(line):
                executions = int(status[1])
                outcome.edges = max(outcome.edges or 0, int(status[2]))
                outcome.peak_rss_mb = max(outcome.peak_rss_mb, int(status[4]))
                if time.monotonic() - said_s > _SAY_EVERY_S:
                    said_s = time.monotonic()
                    say(f"{outcome.target}: {line.strip()}")
            elif final := _FINAL.match(line):
                if final[1] == "peak_rss_mb":
                    outcome.peak_rss_mb = max(outcome.peak_rss_mb, int(final[2]))
                else:
                    executions = int(final[2])
            else:
                words = [*words[-40:], line.rstrip()]
    outcome.executions += executions
    return run.returncode, words


def run_with_mutations(name: str, seconds: float, seed: int, say: Callable[[str], None]) -> Outcome:
    """The same inputs for the same seed, in this process; goes on after a finding. Growth of memory is one."""
    target = load(name)
    outcome = Outcome(name, f"mutations, seed {seed}", 0, 0.0, 0.0, None, [])
    started_s = said_s = time.monotonic()
    settled_mb = 0.0
    for data in mutants(target.seeds(), seed, target.words):
        now_s = time.monotonic()
        if now_s - started_s > seconds:
            break
        if now_s - said_s > _SAY_EVERY_S:
            said_s = now_s
            say(f"{name}: {outcome.executions} inputs, {len(outcome.findings)} findings")
        outcome.executions += 1
        if outcome.executions % _INPUTS_PER_LOOK == 0:
            outcome.peak_rss_mb = max(outcome.peak_rss_mb, _rss_mb())
            grown_mb = outcome.peak_rss_mb - (settled_mb := settled_mb or outcome.peak_rss_mb)
            if grown_mb > _GROWTH_LIMIT_MB:
                outcome.findings.append(f"{name}: grew by {grown_mb:.0f} MiB in {outcome.executions} inputs")
                break
        try:
            target.check(data)
        except Exception as error:  # whatever it is, it is a finding
            outcome.findings.append(f"{name}: {type(error).__name__}: {error}: {data[:200].hex()}")
    outcome.seconds = time.monotonic() - started_s
    return outcome


def _rss_mb() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
