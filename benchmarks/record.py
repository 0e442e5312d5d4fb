"""Writes measured rows with what is needed to judge them: machine, versions, date, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("sglang-kvcodec", "sglang", "torch", "av", "grpcio", "lmdb", "zstandard")


def record(name: str, rows: Sequence[Mapping[str, object]]) -> pathlib.Path:
    """Writes ``results/<date>-<name>.json`` and gives its path."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}-{name}.json"
    document = {
        "name": name,
        "date": today,
        "command": " ".join([pathlib.Path(sys.executable).name, *sys.argv]),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpu": _gpu_name()},
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": list(rows),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
