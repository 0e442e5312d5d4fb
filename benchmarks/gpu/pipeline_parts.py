"""The read side whole, as a server runs it: real pages through ``Restorer``, and what that costs a model beside it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from typing import Any

import torch

from benchmarks.gpu.decode_loop import DecodeLoop, ProductLoop
from benchmarks.gpu.real_kv import RealKV
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.video_parts import VALUES_PER_TOKEN, Row
from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import GroupDecoder
from sglang_kvcodec.flow.restore import RestoreJob
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES, Restorer
from sglang_kvcodec.flow.streams import stream_of
from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.kernels import PageRestores
from sglang_kvcodec.kernels.digest import pictures_differ
from sglang_kvcodec.kernels.planes import planes_of
from sglang_kvcodec.testing.rehearsal_streams import RehearsalStreams
from sglang_kvcodec.transform import PackedSide
from sglang_kvcodec.video.nvdec import DECODERS_PER_ENGINE

CODINGS = (("high", 1), ("high", 3), ("balanced", 1), ("balanced", 3))
"""Tier, and layers of a basis."""


class Pipeline:
    """Decode, digest and restore of real pages, flat out: two requests at a time on as many threads as decoders."""

    def __init__(self, rig: Rig, real: RealKV, tier: str, layers_per_basis: int) -> None:
        self.rig = rig
        self.spec = real.spec
        self.group = layer_groups(self.spec)[0]
        self.transforms = real.transforms(tier, layers_per_basis, rig.device)
        self.coded = real.pages(self.transforms, layers_per_basis)
        self.workers = rig.pick(DECODERS_PER_ENGINE * max(1, rig.facts.decode_engines), 2)
        self.segment = [self.coded[index % len(self.coded)] for index in range(rig.pick(SEGMENT_PAGES, 2))]
        pages = self.segment * rig.pick(max(1, self.workers // len(self.spec.sides)), 1)
        slots = 2 * len(pages) * self.spec.page_tokens
        self._buffers = {
            side: [
                torch.zeros((slots, self.spec.kv_heads, self.spec.head_dim), dtype=torch.bfloat16, device=rig.device)
                for _ in range(self.spec.layers)
            ]
            for side in self.spec.sides
        }
        self._jobs = [RestoreJob(pages, each) for each in torch.arange(slots, device=rig.device).chunk(2)]
        self.kernels = PageRestores(self.transforms, rig.device)
        pool = PagedKVPool(
            self.spec, lambda: self._buffers, rig.device, RehearsalStreams() if rig.is_rehearsal else stream_of
        )
        self._decoders = [rig.decoder() for _ in range(self.workers)]
        unused = list(self._decoders)
        self._restorer = Restorer(pool, lambda: GroupDecoder(self.transforms, unused.pop()), self.workers, self.kernels)
        self.works = [functools.partial(self._restore, job) for job in self._jobs]

    @property
    def picture_bits_per_value(self) -> float:
        """Coded bits of pictures over values of the KV."""
        pictures = [page.side_data(0, side).picture for page in self.coded for side in self.spec.sides]
        coded_bytes = sum(len(picture.data) for picture in pictures if picture is not None)
        return 8 * coded_bytes / (len(pictures) * self.spec.layers * self.spec.layer_values)

    def _restore(self, job: RestoreJob) -> None:
        """One request, until it is in the pool."""
        ended, events, failures = threading.Event(), [], []

        def on_layers(group: Any, after: Any) -> None:
            events.extend(after)
            ended.set()

        def on_failure(error: KVCodecError) -> None:
            failures.append(error)
            ended.set()

        self._restorer.start([job], on_layers, on_failure)
        ended.wait()
        if failures:
            raise failures[0]
        for event in events:
            event.synchronize()

    def check(self) -> None:
        """Refuses to measure what restores wrong values: K and V of the first page against the reference."""
        self.works[0]()
        reference = GroupDecoder(self.transforms, self._software())
        for side in self.spec.sides:
            want = reference.decode(self.coded[:1], 0, side)[0].float().cpu()
            rows = torch.stack([layer[: self.spec.page_tokens] for layer in self._buffers[side]]).float().cpu()
            error = float((rows - want).abs().max() / want.abs().max())
            if error > 2**-7:
                raise RuntimeError(f"{side.value} restored with an error of {error:.4f} of the largest value")

    @staticmethod
    def _software() -> Any:
        from sglang_kvcodec.video import open_decoder

        return open_decoder()

    def run(self, seconds: float) -> float:
        """Values restored per second."""
        rounds, elapsed_s = self.rig.rate(self.works, seconds)
        values = len(self._jobs[0].pages) * self._values_per_page
        return rounds * values / elapsed_s

    def decode_alone(self, seconds: float) -> float:
        """Values decoded per second by the same decoders, which nobody reads."""
        data = [page.side_data(0, Side.KEY).picture for page in self.segment]
        pictures = [picture.data for picture in data if picture is not None]
        works = [
            functools.partial(decoder.decode_frames, self.segment[0].parameter_sets, pictures)
            for decoder in self._decoders
        ]
        rounds, elapsed_s = self.rig.rate(works, seconds)
        return rounds * len(self.segment) * self._values_per_page / len(self.spec.sides) / elapsed_s

    def kernels_alone(self) -> dict[str, float]:
        """Seconds of the digests and of the restore of a segment of K, pictures on the device already."""
        header = self.segment[0].header
        data = [page.side_data(0, Side.KEY) for page in self.segment]
        sets, pictures = self.segment[0].parameter_sets, [each.picture for each in data if each.picture is not None]
        canvases = self._software().decode(sets, [picture.data for picture in pictures])
        planes = planes_of(torch.from_numpy(canvases).to(self.rig.device))
        height, width = canvases.shape[1] * 2 // 3, canvases.shape[2]
        kernel = self.kernels.get(header.profile_name, header.calibration_digest)
        packed = [PackedSide(None, each.stored, each.escapes, each.picture.steps) for each in data]
        slots = self._jobs[0].slots[: len(self.segment) * self.spec.page_tokens]
        positions = [page.header.first_position for page in self.segment]
        layers = self._buffers[Side.KEY]
        digests = [picture.plane_digest for picture in pictures]
        return {
            "digest_s": self.rig.seconds(lambda: pictures_differ(planes, width, height, digests)),
            "restore_s": self.rig.seconds(
                lambda: kernel.restore(self.group, Side.KEY, packed, positions, slots, layers, planes)
            ),
        }

    @property
    def _values_per_page(self) -> int:
        return self.spec.layers * self.spec.layer_values * len(self.spec.sides)

    def close(self) -> None:
        self._restorer.close()
        for decoder in self._decoders:
            decoder.close()


def heads_of(rig: Rig) -> int:
    """Of the model that real KV is put together to: pictures as large as those of 8 heads, or small ones."""
    return int(rig.pick(8, 1))


def pipeline(rig: Rig) -> list[Row]:
    """Tokens per second of decode, digest and restore, all engines busy, and the ceiling of each step beside it."""
    real = RealKV(heads_of(rig))
    return [_pipeline_row(rig, real, tier, layers) for tier, layers in rig.pick(CODINGS, CODINGS[:1])]


def _pipeline_row(rig: Rig, real: RealKV, tier: str, layers_per_basis: int) -> Row:
    line = Pipeline(rig, real, tier, layers_per_basis)
    try:
        line.check()
        decode = line.decode_alone(rig.pick(1.0, 0.0))
        times = line.kernels_alone()
        values_per_s = line.run(rig.pick(2.5, 0.0))
    finally:
        line.close()
    segment_values = len(line.segment) * line.spec.layers * line.spec.layer_values
    ceilings = {"NVDEC": decode, "kernels": segment_values / sum(times.values())}
    limit = min(ceilings, key=lambda name: ceilings[name])
    return {
        "path": "NVDEC's planes stay on the device: decode, digest, restore on the decoder's stream",
        "tier": tier,
        "layers_per_basis": layers_per_basis,
        "workers": line.workers,
        "picture_bits_per_value": line.picture_bits_per_value,
        "m_values_per_s": values_per_s / 1e6,
        "tokens_per_s_at_120_ki_values": values_per_s / VALUES_PER_TOKEN,
        "decode_alone_tokens_per_s": decode / VALUES_PER_TOKEN,
        "kernels_alone_tokens_per_s": ceilings["kernels"] / VALUES_PER_TOKEN,
        **{name.replace("_s", "_ms"): seconds * 1e3 for name, seconds in times.items()},
        "limit": f"{limit}, of which {values_per_s / ceilings[limit]:.2f} is reached",
    }


@dataclasses.dataclass(frozen=True)
class _Beside:
    """Rates of a loop, and what the pipeline did at the same time."""

    before: float
    beside: float
    after: float
    values_per_s: float


def interference(rig: Rig) -> list[Row]:
    """Two loops, alone and while the pipeline runs flat out: matrix products, and decode steps of a model."""
    real = RealKV(heads_of(rig))
    rows = []
    for name, make in (("matrix products", ProductLoop), ("decode steps", DecodeLoop)):
        loop = make(rig)
        loop.rate(rig.pick(1.0, 0.0))
        for layers_per_basis in rig.pick((1, 3), (1,)):
            line = Pipeline(rig, real, "high", layers_per_basis)
            try:
                measured = _measure_beside(rig, loop, line)
            finally:
                line.close()
            alone = (measured.before + measured.after) / 2
            rows.append(
                {
                    "loop": name,
                    "layers_per_basis": layers_per_basis,
                    "rounds_per_s_alone": alone,
                    "rounds_per_s_beside": measured.beside,
                    "slow_down": 1 - measured.beside / alone,
                    "drift_of_alone": measured.after / measured.before - 1,
                    "tokens_per_s_at_120_ki_values_beside": measured.values_per_s / VALUES_PER_TOKEN,
                }
            )
        del loop
    return rows


def _measure_beside(rig: Rig, loop: ProductLoop | DecodeLoop, line: Pipeline) -> _Beside:
    for work in line.works:
        work()
    before = loop.rate(rig.pick(1.5, 0.0))
    rates: list[float] = []
    failures: list[Exception] = []

    def run(seconds: float) -> None:
        try:
            rates.append(line.run(seconds))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, args=(rig.pick(4.0, 0.0),))
    thread.start()
    time.sleep(rig.pick(1.0, 0.0))
    beside = loop.rate(rig.pick(2.5, 0.0))
    thread.join()
    if failures:
        raise failures[0]
    return _Beside(before, beside, loop.rate(rig.pick(1.5, 0.0)), rates[0])
