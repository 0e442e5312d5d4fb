"""What the device does beside the engines: ceilings, restore, the whole pipeline, and what it costs a model."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.rig import Rig
from benchmarks.gpu.video_parts import MODEL, VALUES_PER_TOKEN, Row
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups, picture_geometry
from sglang_kvcodec.kernels import PageRestores, check_restore, open_restore
from sglang_kvcodec.kernels.digest import plane_digests
from sglang_kvcodec.kernels.planes import planes_of
from sglang_kvcodec.testing.calibrations import random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform import PackedSide, PageTransforms, get_transform
from sglang_kvcodec.video import open_encoder
from sglang_kvcodec.video.nvdec import DECODERS_PER_ENGINE

SMALL = KVSpec(layers=3, kv_heads=2, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)


def spec_of(rig: Rig) -> KVSpec:
    return rig.pick(MODEL, SMALL)


def ceilings(rig: Rig) -> list[Row]:
    """What the device can at best: copies, and products of matrices in bf16."""
    size_bytes = rig.pick(2 << 30, 1 << 20)
    source = torch.empty(size_bytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    copy_s = rig.seconds(lambda: target.copy_(source))
    host = torch.empty(size_bytes // 4, dtype=torch.uint8, pin_memory=not rig.is_rehearsal)
    host_s = rig.seconds(lambda: target[: len(host)].copy_(host, non_blocking=True))
    side = rig.pick(8192, 128)
    matrix = torch.randn(side, side, device=rig.device, dtype=torch.bfloat16)
    product_s = rig.seconds(lambda: matrix @ matrix)
    return [
        {
            "copy_gb_per_s": 2 * size_bytes / copy_s / 1e9,
            "host_to_device_gb_per_s": len(host) / host_s / 1e9,
            "matmul_tflop_per_s": 2 * side**3 / product_s / 1e12,
        }
    ]


def restore_identity(rig: Rig, copy_gb_per_s: float | None) -> list[Row]:
    """The kernels of profiles without a calibration, canvases on the device already: bytes read and written."""
    rows = []
    spec = spec_of(rig)
    pages = rig.pick(64, 2)
    group = layer_groups(spec)[0]
    for profile in ("exact", "high"):
        kernel = open_restore(profile, spec)
        if kernel is None:
            raise RuntimeError(f"profile {profile!r} has no kernel")
        check_restore(kernel, profile, spec, rig.device)
        packed = get_transform(profile, spec).pack(kv_like(spec, pages, group.layers, seed=0))
        packed = [_on_device(side, rig) for side in packed]
        slots = torch.randperm(pages * spec.page_tokens, generator=torch.Generator().manual_seed(0)).to(rig.device)
        buffers = [
            torch.zeros((len(slots), spec.kv_heads, spec.head_dim), dtype=torch.bfloat16, device=rig.device)
            for _ in range(group.layers)
        ]
        seconds = rig.seconds(functools.partial(kernel.restore, packed, slots, buffers))
        moved = sum(side.canvas.numel() + len(side.stored) for side in packed) + 2 * sum(b.numel() for b in buffers)
        groups = len(layer_groups(spec)) * len(spec.sides)
        rows.append(
            {
                "profile": profile,
                "tokens": len(slots),
                "all_layers_ms": seconds * groups * 1e3,
                "gb_per_s": moved / seconds / 1e9,
                "share_of_copy_bandwidth": moved / seconds / 1e9 / copy_gb_per_s if copy_gb_per_s else None,
                "includes": "launch and the host's preparation, escapes and stored bytes sent from the host",
            }
        )
    return rows


def _on_device(side: PackedSide, rig: Rig) -> PackedSide:
    return PackedSide(side.canvas.to(rig.device), side.stored, side.escapes, side.steps)


def restore_klt(rig: Rig, matmul_tflop_per_s: float | None) -> list[Row]:
    """Calibrated pages, with a basis per layer and one over three."""
    return [row for blocks in (1, 3) for row in _klt_rows(rig, matmul_tflop_per_s, blocks)]


def _klt_rows(rig: Rig, matmul_tflop_per_s: float | None, layers_per_basis: int) -> list[Row]:
    """By the reference on the device, and by the kernel."""
    spec = spec_of(rig)
    pages = rig.pick(64, 2)
    tokens = pages * spec.page_tokens
    calibration = random_calibration(spec, layers_per_block=layers_per_basis)
    transforms = PageTransforms(spec, "high", [calibration], rig.device)
    transform = transforms.get("high", calibration.digest)
    group = layer_groups(spec)[0]
    values = kv_like(spec, pages, group.layers, seed=0).to(rig.device)
    packed = transform.pack(group, Side.KEY, values, [0] * pages)
    if packed is None:
        raise RuntimeError("the test calibration can't code the test values")
    width = layers_per_basis * spec.channels
    flop = 2 * width * tokens * spec.channels * spec.layers * len(spec.sides)

    def row(what: str, work: Callable[[], object]) -> Row:
        seconds = rig.seconds(work, rig.pick(5, 1)) * len(layer_groups(spec)) * len(spec.sides)
        return {
            "by": what,
            "layers_per_basis": layers_per_basis,
            "tokens": tokens,
            "all_layers_ms": seconds * 1e3,
            "tflop_per_s": flop / seconds / 1e12,
            "share_of_matmul": flop / seconds / 1e12 / matmul_tflop_per_s if matmul_tflop_per_s else None,
        }

    rows = [row("transform, torch", lambda: transform.restore(group, Side.KEY, packed, [0] * pages))]
    kernel = PageRestores(transforms, rig.device).get("high", calibration.digest)
    slots = torch.arange(tokens, device=rig.device)
    buffers = list(torch.zeros((group.layers, tokens, *values.shape[3:]), dtype=values.dtype, device=rig.device))
    return [*rows, row("kernel", lambda: kernel.restore(group, Side.KEY, packed, [0] * pages, slots, buffers))]


def digest(rig: Rig, copy_gb_per_s: float | None) -> list[Row]:
    """The digests of pictures that lie on the device: bytes read."""
    pages = rig.pick(256, 2)
    geometry = picture_geometry(spec_of(rig))
    canvases = torch.randint(0, 256, (pages, *geometry.canvas_shape), dtype=torch.uint8, device=rig.device)
    planes = planes_of(canvases)
    expected = [plane_digest(canvas) for canvas in canvases[:2].cpu().numpy()]
    found = plane_digests(planes, geometry.width, geometry.height)[:2].cpu().numpy().view(np.uint64).tolist()
    if found != expected:
        raise RuntimeError("the digest kernel does not give the digest of the pictures")
    seconds = rig.seconds(lambda: plane_digests(planes, geometry.width, geometry.height))
    gb_per_s = canvases.numel() / seconds / 1e9
    return [
        {
            "pictures": pages,
            "gb_per_s": gb_per_s,
            "share_of_copy_bandwidth": gb_per_s / copy_gb_per_s if copy_gb_per_s else None,
        }
    ]


class Pipeline:
    """Decode, digest and restore of pages, flat out on as many threads as there are decoders.

    As the restorer does it now: planes are copied to the host, checked there, and sent back to the kernel. With the
    kernels that take an engine's frames this is where they go: ``GroupDecoder.decode_frames``, digest and restore on
    ``frames.stream``.
    """

    def __init__(self, rig: Rig, profile: str = "exact") -> None:
        self.rig = rig
        self.spec = spec_of(rig)
        group = layer_groups(self.spec)[0]
        self.group_spec = KVSpec(
            group.layers, self.spec.kv_heads, self.spec.head_dim, self.spec.page_tokens, self.spec.dtype
        )
        transforms = PageTransforms(self.group_spec, profile)
        encoder = PageEncoder(bytes(32), transforms, open_encoder())
        values = kv_like(self.group_spec, 4, group.layers, seed=0)
        coded = [encoder.encode(bytes([n]) * 32, dict.fromkeys(self.group_spec.sides, values[n])) for n in range(4)]
        self.pages = [PageObject(coded[n % 4]) for n in range(rig.pick(32, 3))]
        kernel = open_restore(profile, self.group_spec)
        if kernel is None:
            raise RuntimeError(f"profile {profile!r} has no kernel")
        self._kernel = kernel
        self.coded_bits_per_value = (
            8 * sum(map(len, coded)) / (4 * group.layers * len(self.spec.sides) * self.spec.layer_values)
        )
        count = rig.pick(DECODERS_PER_ENGINE * max(1, rig.facts.decode_engines), 2)
        self._decoders = [rig.decoder() for _ in range(count)]
        self.works = [self._work(GroupDecoder(transforms, decoder), decoder.stream) for decoder in self._decoders]

    def _work(self, decoder: GroupDecoder, stream: int) -> Callable[[], None]:
        spec, rig = self.group_spec, self.rig
        slots = torch.arange(len(self.pages) * spec.page_tokens, device=rig.device)
        shape = (spec.layers, len(slots), spec.kv_heads, spec.head_dim)
        buffers = list(torch.zeros(shape, dtype=torch.bfloat16, device=rig.device))

        def work() -> None:
            packed = decoder.unpack(self.pages, 0, Side.KEY)
            with rig.on_stream(stream):
                self._kernel.restore(packed, slots, buffers)
            rig.driver.synchronize(stream)

        return work

    def run(self, seconds: float) -> float:
        """Values restored per second."""
        rounds, elapsed_s = self.rig.rate(self.works, seconds)
        return rounds * len(self.pages) * self.group_spec.layers * self.group_spec.layer_values / elapsed_s

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.close()


def pipeline(rig: Rig) -> list[Row]:
    """Tokens per second of decode, digest and restore, all engines busy."""
    line = Pipeline(rig)
    for work in line.works:
        work()
    values_per_s = line.run(rig.pick(5.0, 0.0))
    line.close()
    return [
        {
            "path": "planes through the host, digest on the host, Triton restore",
            "profile": "exact",
            "workers": len(line.works),
            "bits_per_value": line.coded_bits_per_value,
            "m_values_per_s": values_per_s / 1e6,
            "tokens_per_s_at_120_ki_values": values_per_s / VALUES_PER_TOKEN,
        },
        {
            "path": "planes stay on the device",
            "not_measured": "kernels read an engine's planes where they lie, but the restorer does not yet let them",
        },
    ]


def interference(rig: Rig) -> list[Row]:
    """A loop of matrix products alone and while the pipeline runs flat out."""
    side = rig.pick(4096, 96)
    matrix = torch.randn(side, side, device=rig.device, dtype=torch.bfloat16)

    def product_rate(seconds: float) -> float:
        done, start_s = 0, time.perf_counter()
        while not done or time.perf_counter() - start_s < seconds:
            for _ in range(rig.pick(16, 2)):
                matrix @ matrix
            rig.synchronize_current()
            done += rig.pick(16, 2)
        return done / (time.perf_counter() - start_s)

    product_rate(rig.pick(1.0, 0.0))
    before = product_rate(rig.pick(4.0, 0.0))
    line = Pipeline(rig)
    for work in line.works:
        work()
    box: dict[str, float] = {}
    seconds = rig.pick(8.0, 0.0)

    def run() -> None:
        try:
            box["values_per_s"] = line.run(seconds)
        except Exception as error:
            failures.append(error)

    failures: list[Exception] = []
    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(rig.pick(2.0, 0.0))
    beside = product_rate(rig.pick(4.0, 0.0))
    thread.join()
    line.close()
    if failures:
        raise failures[0]
    after = product_rate(rig.pick(4.0, 0.0))
    alone = (before + after) / 2
    return [
        {
            "products_per_s_alone": alone,
            "products_per_s_beside": beside,
            "slow_down": 1 - beside / alone,
            "drift_of_alone": after / before - 1,
            "m_values_per_s_beside": box["values_per_s"] / 1e6,
        }
    ]


Part = Callable[..., list[dict[str, Any]]]
