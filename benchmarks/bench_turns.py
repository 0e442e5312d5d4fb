"""What threads that prepare work for a GPU cost each other and the scheduler's thread, taking turns and not.

    python benchmarks/bench_turns.py [--threads N] [--record]

Each thread does what a decoder's does in Python for a part of 32 real pages: side data, the checked segment, the arrays
of a calibrated restore; the engines' time is a sleep. Beside them a thread does a short piece of work again and again,
as a scheduler does. No GPU is needed; torch's calls for one are stood in for by small allocations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from gpu.real_kv import RealKV
from record import record

from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.kernels.basis import group_basis
from sglang_kvcodec.kernels.calibrated_sides import calibrated_sides
from sglang_kvcodec.kernels.upload import upload_together
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.video.segments import SegmentMemory, check_units, joined_segment

PAGES = 32
DEVICE_CALLS = 20
SHORT_WORK_CALLS = 20
SECONDS = 4.0


def main() -> None:
    """Prints and keeps rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 14])
    parser.add_argument("--decode-ms", type=float, default=36.0, help="of a part; 14 decoders on 7 engines of an H200")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part = Part()
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        for turn in (contextlib.nullcontext(), threading.Lock()):
            rows.append(
                {
                    "threads": threads,
                    "take_turns": not isinstance(turn, contextlib.nullcontext),
                    "decode_ms": arguments.decode_ms,
                    **part.measure(threads, turn, arguments.decode_ms / 1e3),
                }
            )
            print(json.dumps(rows[-1]))
    if arguments.record:
        print(record("turns", rows))


class Part:
    """32 pages of one layer group of K, coded in tier ``high`` with a basis over three layers."""

    def __init__(self) -> None:
        real = RealKV(8)
        pages = real.pages(real.transforms("high", 3, "cpu"), 3)
        self._pages = [pages[index % len(pages)] for index in range(PAGES)]
        self._tokens = real.spec.page_tokens
        self._basis = group_basis(
            real.spec,
            real.calibrations[3],
            "high",
            layer_groups(real.spec)[0],
            Side.KEY,
            tile_values=128,
            column_block=64,
            device=torch.device("cpu"),
        )

    def measure(self, threads: int, turn: AbstractContextManager[Any], decode_s: float) -> dict[str, float]:
        """Parts per second, and what the short work took."""
        end_s = time.perf_counter() + SECONDS
        done, took_ms = [0] * threads, []

        def prepare(index: int) -> None:
            memory = SegmentMemory()
            while time.perf_counter() < end_s:
                with turn:
                    data = [page.side_data(0, Side.KEY) for page in self._pages]
                    pictures = [each.picture.data for each in data if each.picture is not None]
                    _, segment = joined_segment(self._pages[0].parameter_sets, pictures, memory)
                check_units(segment, len(pictures))
                time.sleep(decode_s)
                with turn:
                    packed = [
                        PackedSide(None, each.stored, each.escapes, each.picture.steps if each.picture else ())
                        for each in data
                    ]
                    sides = calibrated_sides(packed, self._basis, self._tokens, canvas=False, block_rows=128)
                    upload_together(sides, torch.device("cpu"))
                    _small_calls(DEVICE_CALLS)
                done[index] += 1

        def schedule() -> None:
            while time.perf_counter() < end_s:
                begin_s = time.perf_counter()
                _small_calls(SHORT_WORK_CALLS)
                took_ms.append((time.perf_counter() - begin_s) * 1e3)
                time.sleep(0.002)

        works = [threading.Thread(target=prepare, args=(index,)) for index in range(threads)]
        works.append(threading.Thread(target=schedule))
        start_s = time.perf_counter()
        for work in works:
            work.start()
        for work in works:
            work.join()
        return {
            "parts_per_s": sum(done) / (time.perf_counter() - start_s),
            "short_work_median_ms": float(np.median(took_ms)),
            "short_work_95th_percentile_ms": float(np.percentile(took_ms, 95)),
        }


def _small_calls(count: int) -> None:
    for _ in range(count):
        torch.empty(1)


if __name__ == "__main__":
    main()
