"""``python -m fuzzing``: see ``scripts/fuzz``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
import pathlib
import sys
import time

from fuzzing.parsers import MODULES_OF
from fuzzing.run_parser import Outcome, run_with_atheris, run_with_mutations

_PEER = "peer"


def main() -> int:
    """Runs what was asked for; 1 with a finding, 2 if it can't."""
    names = [*MODULES_OF, _PEER]
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the peer's calls, and of mutations; the time by default"
    )
    parser.add_argument(
        "--engine",
        choices=("atheris", "mutations"),
        default="atheris",
        help="for parsers: atheris follows coverage, mutations need no package",
    )
    parser.add_argument(
        "--directory", type=pathlib.Path, default=pathlib.Path("build/fuzz"), help="corpora and findings"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    targets = arguments.targets or names
    if unknown := sorted(set(targets) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.engine == "atheris" and set(targets) - {_PEER} and importlib.util.find_spec("atheris") is None:
        parser.error("needs the package atheris: pip install atheris, or --engine mutations")
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    logging.disable(logging.CRITICAL)
    outcomes, load = [], os.getloadavg()[0]
    for name in targets:
        say(f"{name}: {arguments.seconds:g} s")
        outcomes.append(_run(name, arguments, seed))
        show(outcomes[-1])
    if arguments.record:
        from benchmarks.record import record

        rows = [{**dataclasses.asdict(outcome), "load_average_before": load} for outcome in outcomes]
        say(str(record("fuzz", rows)))
    return 1 if any(outcome.findings for outcome in outcomes) else 0


def _run(name: str, arguments: argparse.Namespace, seed: int) -> Outcome:
    if name == _PEER:
        from fuzzing.peer import run_peer

        return run_peer(arguments.seconds, seed, say)
    if arguments.engine == "atheris":
        return run_with_atheris(name, arguments.seconds, arguments.directory, say)
    return run_with_mutations(name, arguments.seconds, seed, say)


def show(outcome: Outcome) -> None:
    """Prints what came of a target."""
    edges = f", {outcome.edges} edges" if outcome.edges is not None else ""
    say(
        f"{outcome.target}: {outcome.executions} executions in {outcome.seconds:.0f} s{edges},"
        f" at most {outcome.peak_rss_mb:.0f} MiB, {len(outcome.findings)} findings"
    )
    for finding in outcome.findings:
        say(f"  {finding}")


def say(words: str) -> None:
    """Prints a line at once."""
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
