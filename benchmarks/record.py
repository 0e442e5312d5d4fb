"""Keeps what a benchmark measured, with all that is needed to judge it later."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = (
    "sglang-kvcodec",
    "sglang",
    "torch",
    "triton",
    "av",
    "PyNvVideoCodec",
    "grpcio",
    "protobuf",
    "lmdb",
    "numpy",
    "zstandard",
    "hypothesis",
    "atheris",
)


def record(name: str, rows: Sequence[Mapping[str, object]]) -> pathlib.Path:
    """Writes ``results/<date>-<name>.json``; a second run of a day gets a number, so that no result is lost.

    Args:
        name: the benchmark, e.g. ``storage``.
        rows: one per measured configuration: its settings, its figures with units in their names, and the ratio to a
            baseline that was measured in the same run.

    Returns:
        The file.
    """
    now = datetime.datetime.now(datetime.UTC)
    document = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        # A machine that has the files need not have their history.
        "commit": os.environ.get("KVCODEC_COMMIT")
        or _output(["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]),
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path, number = RESULTS / f"{now:%Y-%m-%d}-{name}.json", 1
    while path.exists():
        number += 1
        path = RESULTS / f"{now:%Y-%m-%d}-{name}-{number}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def machine() -> dict[str, object]:
    """CPU, cores, memory, GPU (None without one) and kernel of this machine."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpus = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": gpus.splitlines() if gpus else None,
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Python and those of our libraries that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
