"""What is measured on: a GPU, or a rehearsal of one on a CPU, behind the same few calls."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sglang_kvcodec.testing.rehearsal import RehearsalDriver, RehearsalLibrary
from sglang_kvcodec.video.base import EncodedPictures
from sglang_kvcodec.video.cuda_driver import CudaDriver
from sglang_kvcodec.video.nvdec import NvdecDecoder
from sglang_kvcodec.video.nvidia import NvidiaFacts, find_facts, load_library, probe_nvidia
from sglang_kvcodec.video.software import SoftwareEncoder

_AHEAD_CYCLES = 40_000_000
"""Twenty milliseconds or so, in which the host queues what is measured."""


class Rig:
    """The device, the video library, sizes and times."""

    def __init__(self, is_small: bool, is_rehearsal: bool) -> None:
        self.is_rehearsal = is_rehearsal
        self.is_small = is_small
        self.device = torch.device("cpu" if self.is_rehearsal else "cuda:0")
        self.library: Any
        self.driver: Any
        if self.is_rehearsal:
            self.library, self.driver = RehearsalLibrary(engines=1), RehearsalDriver()
            self.facts = find_facts(self.library, self.driver)
        else:
            torch.zeros(1, device=self.device)
            # In a child first: what kills a process must not kill this one.
            self.facts = probe_nvidia(0)
            self.library, self.driver = (
                (load_library(), CudaDriver(0)) if not self.facts.decode_problem else (None, None)
            )

    def pick(self, full: Any, small: Any) -> Any:
        """A size."""
        return small if self.is_small else full

    def decoder(self) -> NvdecDecoder:
        """A decoder on a stream of its own."""
        if self.library is None:
            raise RuntimeError(f"NVDEC can't be used: {self.facts.decode_problem}")
        return NvdecDecoder(self.library, self.driver)

    def synchronize(self) -> None:
        if not self.is_rehearsal:
            torch.cuda.synchronize()

    def synchronize_current(self) -> None:
        """Waits for this thread's stream alone, not for what others do."""
        if not self.is_rehearsal:
            torch.cuda.current_stream().synchronize()

    @contextlib.contextmanager
    def beside(self, work: Callable[[], object]) -> Iterator[None]:
        """Does ``work`` again and again on a thread of its own while the body runs."""
        is_under_way, stop, failures = threading.Event(), threading.Event(), []

        def run() -> None:
            try:
                while not stop.is_set():
                    is_under_way.set()
                    work()
            except Exception as error:
                failures.append(error)
                is_under_way.set()

        thread = threading.Thread(target=run)
        thread.start()
        is_under_way.wait()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Median time of ``work`` on the device, after warming up: by events on a GPU, by the clock elsewhere."""
        repeats = repeats or self.pick(20, 2)
        for _ in range(self.pick(3, 1)):
            work()
        self.synchronize()
        times = []
        for _ in range(repeats):
            if self.is_rehearsal:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
                continue
            times.append(_seconds_between_events(work))
        return statistics.median(times)

    def device_seconds(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Median time that ``work``, which must not wait for it, keeps the device busy, the host being far ahead."""
        if self.is_rehearsal:
            return self.seconds(work, repeats)
        work()
        self.synchronize()
        times = []
        for _ in range(repeats or self.pick(20, 2)):
            torch.cuda._sleep(_AHEAD_CYCLES)
            times.append(_seconds_between_events(work))
        return statistics.median(times)

    def rate(self, works: Sequence[Callable[[], object]], seconds: float) -> tuple[int, float]:
        """How often the works were done, each on a thread of its own, and in how many seconds."""
        counts = [0] * len(works)
        end_s = time.perf_counter() + seconds

        failures: list[Exception] = []

        def run(index: int) -> None:
            try:
                while not counts[index] or time.perf_counter() < end_s:
                    works[index]()
                    counts[index] += 1
            except Exception as error:
                failures.append(error)

        start_s = time.perf_counter()
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self.synchronize()
        return sum(counts), time.perf_counter() - start_s


def _seconds_between_events(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def noise_segment(
    width: int, height: int, pictures: int, bits_per_sample: float, seed: int = 0
) -> tuple[np.ndarray, EncodedPictures]:
    """Canvases of about such an entropy, a quarter of them different, and what they are coded."""
    sigma = 2**bits_per_sample / np.sqrt(2 * np.pi * np.e)
    shape = (max(1, pictures // 4), height * 3 // 2, width)
    values = np.random.default_rng(seed).normal(128, sigma, shape)
    different = values.round().clip(0, 255).astype(np.uint8)
    encoded = SoftwareEncoder(uniform_blocks=True).encode(different)
    turns = [index % len(different) for index in range(pictures)]
    return different[turns], EncodedPictures(encoded.parameter_sets, tuple(encoded.pictures[turn] for turn in turns))


def describe(facts: NvidiaFacts) -> dict[str, Any]:
    """Facts as a row."""
    return {
        "gpu": facts.gpu,
        "cuda": facts.cuda,
        "decode": facts.decode_problem or f"{facts.decode_engines} engines",
        "encode": facts.encode_problem or f"{facts.encode_engines} engines",
        "decode_limits": facts.decode_limits,
    }
