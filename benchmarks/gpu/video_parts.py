"""What NVDEC does: exactness, rates, latency, memory, damage."""

from __future__ import annotations

import fractions
import functools
import shutil
import subprocess
import time
from typing import Any

import av
import numpy as np

from benchmarks.gpu.decode_loop import ProductLoop
from benchmarks.gpu.real_kv import RealKV
from benchmarks.gpu.rig import Rig, noise_segment
from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.flow.restore_buffers import restore_buffer_bytes
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, picture_geometry
from sglang_kvcodec.video.base import EncodedPictures
from sglang_kvcodec.video.nvdec import NvdecDecoders, reserved_bytes
from sglang_kvcodec.video.software import SoftwareDecoder

Row = dict[str, Any]
MODEL = KVSpec(layers=32, kv_heads=8, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
VALUES_PER_TOKEN = 120 << 10
"""Of the paper's Yi-34B: the target is stated for it."""
_X265 = "lossless=1:repeat-headers=1:annexb=1:no-info=1:log-level=none"
_FOREIGN = {
    "x265 defaults: level 8.5, wavefronts, B frames": _X265,
    "level 8.5, predicted pictures": _X265 + ":bframes=0:ref=1:no-wpp=1:no-open-gop=1",
    "level 8.5, all intra": _X265 + ":bframes=0:ref=1:no-wpp=1:no-open-gop=1:keyint=1",
    "level 8.5, blocks of 16": _X265 + ":bframes=0:ref=1:no-wpp=1:keyint=1:ctu=16",
}
"""Streams that the project does not write: what the hardware makes of them tells what it minds."""


def exactness(rig: Rig) -> list[Row]:
    """Our streams in several sizes, bit for bit, on a new and on a reused decoder; then streams of others."""
    rows = []
    sizes = rig.pick(
        ((192, 192), (256, 192), (512, 256), (1024, 512), (512, 1536), (4096, 192)), ((192, 192), (256, 192))
    )
    for width, height in sizes:
        canvases, encoded = noise_segment(width, height, rig.pick(32, 5), 2.0)
        decoder = rig.decoder()
        same = [np.array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases) for _ in range(3)]
        rows.append({"stream": "ours", "width": width, "height": height, "is_exact": all(same)})
        decoder.close()
    for name, parameters in _FOREIGN.items():
        rows.append({"stream": name, "width": 256, "height": 192} | _foreign(rig, parameters))
    return rows


def _foreign(rig: Rig, parameters: str) -> Row:
    """Feeds a whole stream of another encoder to the library itself; our decoder would not take it."""
    canvases, _ = noise_segment(256, 192, 4, 2.0)
    stream = np.frombuffer(_encode_foreign(canvases, parameters), np.uint8)
    decoder = rig.decoder()
    try:
        core = decoder._decoder((256, 192))
        frames = core.Decode(decoder._packet(stream))
        if len(frames) != len(canvases):
            return {"is_exact": False, "why": f"{len(frames)} pictures came out of {len(canvases)}"}
        planes = np.empty_like(canvases)
        for frame, plane in zip(frames, planes, strict=True):
            rig.driver.copy_to_host(plane[:192], frame.GetPtrToPlane(0), int(frame.strides[0]), decoder.stream)
            rig.driver.copy_to_host(plane[192:], frame.GetPtrToPlane(1), int(frame.strides[0]), decoder.stream)
        rig.driver.synchronize(decoder.stream)
        return {"is_exact": bool(np.array_equal(planes, canvases))}
    except Exception as error:
        return {"is_exact": False, "why": f"{type(error).__name__}: {error}"}
    finally:
        decoder.close()


def _encode_foreign(canvases: np.ndarray, parameters: str) -> bytes:
    context = av.VideoCodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt = canvases.shape[2], canvases.shape[1] * 2 // 3, "yuv420p"
    context.time_base = fractions.Fraction(1, 25)
    context.options = {"preset": "ultrafast", "x265-params": parameters}
    stream = b""
    for number, canvas in enumerate(canvases):
        # NV12 has its chroma interleaved, yuv420p one plane after the other.
        luma, chroma = canvas[: context.height], canvas[context.height :]
        planar = np.concatenate([luma.ravel(), chroma[:, 0::2].ravel(), chroma[:, 1::2].ravel()])
        frame = av.VideoFrame.from_ndarray(planar.reshape(canvas.shape), format="yuv420p")
        frame.pts = number
        stream += b"".join(map(bytes, context.encode(frame)))
    return stream + b"".join(map(bytes, context.encode(None)))


def capabilities(rig: Rig) -> list[Row]:
    """What the engines say they decode, and the clocks: what else a format could use, and what rates depend on."""
    formats = [("HEVC", chroma) for chroma in ("420", "444", "Monochrome")] + [("AV1", "420")]
    rows: list[Row] = []
    for codec, chroma in formats:
        row: Row = {"codec": codec, "chroma": chroma}
        try:
            caps = rig.library.GetDecoderCaps(
                gpuid=rig.driver.device,
                codec=getattr(rig.library.cudaVideoCodec, codec),
                chromaformat=getattr(rig.library.cudaVideoChromaFormat, chroma),
                bitdepth=8,
            )
            rows.append(row | {name: int(value) for name, value in caps.items() if name != "codec_id"})
        except Exception as error:
            # An engine that is not there is an exception of the wheel's own.
            rows.append(row | {"why_not": f"{type(error).__name__}: {error}"})
    return [*rows, {"clocks": _clocks(rig)}]


def _clocks(rig: Rig) -> str:
    """Of the video engines, as nvidia-smi has them."""
    command = ["nvidia-smi", "--query-gpu=clocks.video,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    if rig.is_rehearsal or shutil.which(command[0]) is None:
        return "not known: there is no nvidia-smi"
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return "video, SM, highest SM, memory: " + said.stdout.strip()


def _real_segments(rig: Rig) -> list[tuple[str, EncodedPictures, int]]:
    """Real pictures of K: their name, 32 of them, and their samples."""
    real = RealKV(rig.pick(8, 1))
    segments = []
    for tier, layers in rig.pick((("high", 1), ("high", 3), ("balanced", 1), ("balanced", 3)), (("high", 3),)):
        transforms = real.transforms(tier, layers, "cpu" if rig.is_rehearsal else rig.device)
        pages = real.pages(transforms, layers)
        pictures = [page.side_data(0, Side.KEY).picture for page in pages]
        coded = [pictures[index % len(pictures)].data for index in range(rig.pick(32, 3))]
        rows, width = transforms.get(tier, real.calibrations[layers].digest).canvas_shape
        name = f"{tier}, real, basis over {layers}"
        segments.append((name, EncodedPictures(pages[0].parameter_sets, tuple(coded)), rows * width * len(coded)))
    return segments


def decode_rates(rig: Rig) -> list[Row]:
    """Samples and coded bits per second, against bits per sample and decoders. The coded rate's maximum is CABAC's."""
    geometry = picture_geometry(MODEL)
    size = rig.pick((geometry.width, geometry.height), (192, 192))
    rows = []
    segments = _real_segments(rig)
    for bits in rig.pick((0.7, 1.33, 2.0, 2.7, 4.0, 6.0), (2.0,)):
        canvases, encoded = noise_segment(*size, rig.pick(32, 4), bits)
        segments.append(("noise", encoded, canvases.size))
    counts = rig.pick((1, 2, 4, 7, 14), (1, 2))
    # The same for all: a decoder takes longer to make than a rate to measure.
    decoders = [rig.decoder() for _ in range(max(counts))]
    for name, encoded, samples in segments:
        coded_bits = 8 * sum(map(len, encoded.pictures))
        works = [
            functools.partial(decoder.decode_frames, encoded.parameter_sets, encoded.pictures) for decoder in decoders
        ]
        for work in works:
            work()
        for count in counts:
            rounds, elapsed_s = rig.rate(works[:count], rig.pick(0.6, 0.0))
            rows.append(
                {
                    "pictures": name,
                    "decoders": count,
                    "bits_per_sample": round(coded_bits / samples, 3),
                    "samples_mb_per_s": samples * rounds / elapsed_s / 1e6,
                    "coded_gbit_per_s": coded_bits * rounds / elapsed_s / 1e9,
                    "pictures_per_s": len(encoded.pictures) * rounds / elapsed_s,
                    "tokens_per_s_at_120_ki_values": samples * rounds / elapsed_s / VALUES_PER_TOKEN,
                }
            )
    for decoder in decoders:
        decoder.close()
    return rows


def latency(rig: Rig) -> list[Row]:
    """Of a first picture: on a decoder that was just made, on a warm one, and the host's part of it."""
    geometry = picture_geometry(MODEL)
    size = rig.pick((geometry.width, geometry.height), (192, 192))
    _, encoded = noise_segment(*size, 4, 2.0)
    source = NvdecDecoders(rig.library, rig.driver, rig.facts.decode_engines, 1)
    start_s = time.perf_counter()
    source.prepare([size], rig.pick(32, 4))
    warm_s = time.perf_counter() - start_s
    new, warm = rig.decoder(), source.decoder()

    def first(decoder: Any) -> float:
        begin_s = time.perf_counter()
        decoder.decode_frames(encoded.parameter_sets, encoded.pictures[:1])
        rig.driver.synchronize(decoder.stream)
        return (time.perf_counter() - begin_s) * 1e3

    rows: list[Row] = [
        {"decoder": "new", "first_picture_ms": first(new)},
        {"decoder": "warm", "first_picture_ms": first(warm), "pool_ready_s": warm_s},
        {"decoder": "warm, again", "first_picture_ms": first(warm)},
    ]
    products = ProductLoop(rig)
    with rig.beside(lambda: products.rate(rig.pick(0.3, 0.0))):
        rows.append({"decoder": "warm, beside products", "first_picture_ms": first(warm)})
    estimate = reserved_bytes([size], rig.pick(32, 4), source.threads)
    restore_bytes = source.threads * restore_buffer_bytes(MODEL, SEGMENT_PAGES, from_host=False)
    rows.append(
        {
            "decoder": "memory",
            "decoders": source.threads,
            "used_bytes": source.used_bytes,
            "estimate_bytes": estimate,
            "restore_bytes": restore_bytes,
        }
    )
    source.close()
    new.close()
    return rows


def damage(rig: Rig) -> list[Row]:
    """Damaged pictures: whether anything is raised, what the digests say, and whether the decoder is sound after."""
    canvases, encoded = noise_segment(256, 192, 4, 2.0)
    rng, decoder = np.random.default_rng(0), rig.decoder()
    raised = caught = unchanged = 0
    tries = rig.pick(40, 4)
    for _ in range(tries):
        bad = bytearray(encoded.pictures[1])
        bad[int(rng.integers(8, len(bad)))] ^= 1 << int(rng.integers(8))
        try:
            decoded = decoder.decode(encoded.parameter_sets, [encoded.pictures[0], bytes(bad), *encoded.pictures[2:]])
        except CodecError:
            raised += 1
            continue
        if np.array_equal(decoded, canvases):
            unchanged += 1
        else:
            caught += any(plane_digest(a) != plane_digest(b) for a, b in zip(decoded, canvases, strict=True))
    sound = np.array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases)
    decoder.close()
    return [
        {
            "tries": tries,
            "raised": raised,
            "found_by_digest": caught,
            "same_samples": unchanged,
            "is_sound_after": sound,
        }
    ]


def encoder(rig: Rig) -> list[Row]:
    """NVENC, where there is one: exactness by software, and rate."""
    from sglang_kvcodec.video.nvenc import NvencEncoder

    if rig.facts.encode_problem:
        return [{"encoder": "nvenc", "why_not": rig.facts.encode_problem}]
    canvases, by_x265 = noise_segment(256, 192, rig.pick(32, 4), 2.0)
    nvenc = NvencEncoder(rig.library, 0)
    encoded = nvenc.encode(canvases)
    exact = np.array_equal(SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures), canvases)
    rounds, elapsed_s = rig.rate([lambda: nvenc.encode(canvases)], rig.pick(2.0, 0.0))
    return [
        {
            "encoder": "nvenc",
            "is_exact": exact,
            "samples_mb_per_s": canvases.size * rounds / elapsed_s / 1e6,
            "bytes_against_x265": sum(map(len, encoded.pictures)) / sum(map(len, by_x265.pictures)),
        }
    ]
