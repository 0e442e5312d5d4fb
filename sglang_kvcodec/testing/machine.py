"""What a measurement was made on: belongs beside every number."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

_DISTRIBUTIONS = ("sglang-kvcodec", "sglang", "torch", "av", "grpcio", "lmdb")


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows, none without a driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def describe_machine() -> dict[str, object]:
    """CPU model, cores that this process may use, and GPUs."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpu_names(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of what the results depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
