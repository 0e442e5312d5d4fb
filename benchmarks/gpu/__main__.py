"""``python -m benchmarks.gpu [--small] [--only PART] [--out DIR]``: validates and measures the GPU path.

It takes less than eight minutes and needs torch, triton, grpcio, prometheus_client, protobuf, safetensors, PyAV, NumPy
and PyNvVideoCodec; no SGLang, no network, no model: real pictures are made from KV that was kept of one
(``real_kv.npz``). Each part is tried by itself: one that fails is a row that says so, and the exit status is 1. On a
machine without a GPU ``--small`` rehearses every part on the CPU, in Triton's interpreter and with a stand-in for the
video library. What that prints is marked, is no figure of a GPU, and is stored only where ``--out`` says.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

BUDGET_S = 450.0
"""Of eight minutes; a part that would begin later is left out, which its row says."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes; without a GPU, a rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, even where there is a GPU; with --small")
    parser.add_argument(
        "--only", metavar="PART", action="append", help="this part, may be given again; environment and ceilings always"
    )
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args(argv)
    is_rehearsal = arguments.rehearse or not _has_driver()
    if is_rehearsal:
        if not arguments.small:
            print("only --small can be rehearsed on a CPU", file=sys.stderr)
            return 2
        # Before Triton is imported: it is settled then for the whole process.
        os.environ["TRITON_INTERPRET"] = "1"

    from benchmarks.gpu.rig import Rig
    from benchmarks.gpu.table import as_text

    try:
        rig = Rig(arguments.small, is_rehearsal)
    except RuntimeError as error:
        print(f"the GPU can't be used: {error}", file=sys.stderr)
        return 2
    try:
        results = measure(rig, arguments.only)
    except KeyError as error:
        parser.error(f"there is no part {error}")
    document = {"is_rehearsal": rig.is_rehearsal, "is_small": rig.is_small, "parts": results}
    text = as_text(document)
    print(text)
    path = store(document, arguments.out)
    print(f"stored in {path}" if path else "a rehearsal is not stored without --out")
    return 1 if any("failed" in row for rows in results.values() for row in rows) else 0


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def measure(rig: Any, only: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """All parts or those named, those that validate before those that take long; KeyError for a part there is not."""
    from benchmarks.gpu import kernel_parts, pack_parts, pipeline_parts, video_parts
    from benchmarks.gpu.rig import describe

    results: dict[str, list[dict[str, Any]]] = {}

    def ceiling(name: str) -> float | None:
        return results["ceilings"][0].get(name)

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "environment": lambda: [describe(rig.facts)],
        "capabilities": lambda: video_parts.capabilities(rig),
        "ceilings": lambda: kernel_parts.ceilings(rig),
        "exactness": lambda: video_parts.exactness(rig),
        "damage": lambda: video_parts.damage(rig),
        "latency": lambda: video_parts.latency(rig),
        "restore_identity": lambda: kernel_parts.restore_identity(rig, ceiling("copy_gb_per_s")),
        "restore_klt": lambda: kernel_parts.restore_klt(rig, ceiling("copy_gb_per_s"), ceiling("matmul_tflop_per_s")),
        "digest": lambda: kernel_parts.digest(rig, ceiling("copy_gb_per_s")),
        "pack": lambda: pack_parts.pack(rig, ceiling("copy_gb_per_s")),
        "pipeline": lambda: pipeline_parts.pipeline(rig),
        "interference": lambda: pipeline_parts.interference(rig),
        "decode_rates": lambda: video_parts.decode_rates(rig),
        "encoder": lambda: video_parts.encoder(rig),
    }
    if only:
        wanted = {"environment", "ceilings"} | {name for name in only if parts[name]}
        parts = {name: part for name, part in parts.items() if name in wanted}
    start_s = time.perf_counter()
    for name, part in parts.items():
        begin_s = time.perf_counter()
        if begin_s - start_s > BUDGET_S:
            results[name] = [{"failed": f"left out: {BUDGET_S:g} s were over"}]
            continue
        try:
            results[name] = part()
        except Exception as error:
            # A part's top: the others are still worth having.
            traceback.print_exc()
            results[name] = [{"failed": f"{type(error).__name__}: {error}"}]
        print(f"[{name}] {time.perf_counter() - begin_s:.1f} s", file=sys.stderr, flush=True)
    return results


def store(document: dict[str, Any], out: pathlib.Path | None) -> pathlib.Path | None:
    """Keeps a result: in ``benchmarks/results`` or in ``out``; a rehearsal only in ``out``, under a name of its own."""
    from benchmarks import record

    if document["is_rehearsal"]:
        if out is None:
            return None
        path = out / "gpu-rehearsal.json"
    elif out is None:
        rows = [{"part": part, **row} for part, rows in document["parts"].items() for row in rows]
        return record.record("gpu-small" if document["is_small"] else "gpu", rows)
    else:
        path = out / "gpu.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(document | {"machine": record.machine(), "versions": record.versions()}, indent=1) + "\n"
    )
    return path


if __name__ == "__main__":
    sys.exit(main())
