"""What lossless HEVC takes over the ideal entropy of a transform's components, by layout, encoder and size of pictures.

Components are the quantised coefficients of a transform over the three layers of a picture, in falling order of
variance. The ideal is the sum over components of the empirical entropy of all its values in the data set: what an
arithmetic coder would need that knows each component's histogram for nothing. Coded bytes are those of whole pictures,
slice headers and start codes included, parameter sets not; and low bits that are stored beside them. A value that the
canvas can't hold is an escape, at 48 bits (docs/format.md).

Speeds are values per second of CPU time on one thread, so that a busy machine tells nearly the same as an idle one.

``python benchmarks/bench_canvas.py [--coefficients FILES.npz ...] [--part figure layout encoder size]``

Each file has arrays ``k`` and ``v``, int ``(documents, groups, tokens, components)``. Without files made-up
coefficients are used, Gaussian with the deviations that were measured on the test model: good to see the trend, not
the figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping

import av
import numpy as np
import numpy.typing as npt
import torch
from record import record

from sglang_kvcodec.format.spec import KVDtype, KVSpec, component_geometry, picture_geometry
from sglang_kvcodec.transform.components import component_layout
from sglang_kvcodec.transform.low_bits import low_bit_counts, low_bits_bytes, split_low_bits
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder

PAGE_TOKENS = 64
ESCAPE_BITS = 48
TIERS = {"high": 1.0, "balanced": 7.7 / 13, "compact": 7.7 / 28}
"""Scale of the components, in steps."""
KNOTS = (0, 2, 6, 12, 24, 48, 96, 192, 288, 384, 480, 576, 672, 767)
DEVIATIONS = {
    "k": (
        (41, 20.7, 9.9, 5.9, 4.3, 2.9, 1.7, 0.73, 0.4, 0.25, 0.15, 0.1, 0.1, 0.1),
        (228, 74, 49, 39, 29.5, 16.3, 6.8, 3, 1.5, 0.75, 0.45, 0.28, 0.19, 0.1),
    ),
    "v": (
        (32.5, 15.7, 11.3, 8.8, 6.4, 3.9, 1.8, 0.7, 0.38, 0.2, 0.16, 0.1, 0.1, 0.1),
        (33.6, 22.7, 18.4, 16.9, 13.6, 10.2, 5.4, 2.3, 1.05, 0.55, 0.27, 0.16, 0.1, 0.1),
    ),
}
"""Of two layer groups of ``tests/models/tiny-code-lm`` at the step of ``high``; between the knots on a log scale."""

Array = npt.NDArray[np.int32]
Layout = Callable[[int, int], tuple[npt.NDArray[np.int64], tuple[int, int]]]
"""``(page_tokens, components)`` to the canvas's index of each value ``(components, page_tokens)``, and its shape."""


def synthetic(tier: str, side: str) -> Array:
    """Six documents of 1024 tokens: ``(documents, groups, tokens, components)``."""
    generator = np.random.default_rng(7)
    groups = [np.exp(np.interp(np.arange(768), KNOTS, np.log(row))) for row in DEVIATIONS[side]]
    wide = generator.standard_normal((6, 2, 1024, 768), np.float32) * (TIERS[tier] * np.stack(groups)[:, None])
    return np.round(wide).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pages of one layer group, with what they ideally take.

    Attributes:
        values: int32 ``(pages, page_tokens, components)``, without escapes.
        ideal_bits: of all of ``values``.
        low_bits: stored beside the pictures.
        escapes: how many values the canvas can't hold.
    """

    values: Array
    ideal_bits: float
    low_bits: int
    escapes: int


def pages_of(
    data: Array, *, low_bits: bool, page_tokens: int = PAGE_TOKENS, wide: int = 1, every: int = 1
) -> list[Pages]:
    """Cuts coefficients into pages, a list entry per layer group.

    Args:
        data: ``(documents, groups, tokens, components)``.
        low_bits: take the low bits of wide components away.
        page_tokens: of a page.
        wide: how many documents lie side by side, component by component, as if a model had so many times the heads.
        every: take each so manieth page only. The ideal is still that of the histograms over all of them.
    """
    documents, groups, _, components = data.shape
    found = []
    for group in range(groups):
        values = data[: documents // wide * wide, group]
        counts = torch.zeros(components, dtype=torch.int32)
        if low_bits:
            counts = low_bit_counts(torch.from_numpy(np.sqrt(np.square(values, dtype=np.float64).mean((0, 1)))))
        high = split_low_bits(torch.from_numpy(values), counts)[0].numpy()
        outside = np.abs(high) > 127
        costs = code_lengths(np.where(outside, 0, values))
        stacked = [_side_by_side(part, wide, page_tokens)[::every] for part in (np.where(outside, 0, high), costs)]
        taken = low_bits_bytes(counts, page_tokens) * 8 * wide * len(stacked[0])
        escapes = int(_side_by_side(outside, wide, page_tokens)[::every].sum())
        found.append(Pages(stacked[0].astype(np.int32), float(stacked[1].sum()), taken, escapes))
    return found


def code_lengths(values: Array) -> npt.NDArray[np.float32]:
    """Ideal bits of each value ``(documents, tokens, components)``: minus log2 of its share in its component."""
    flat = values.reshape(-1, values.shape[-1])
    lengths = np.empty(flat.shape, np.float32)
    for component in range(flat.shape[1]):
        _, inverse, counts = np.unique(flat[:, component], return_inverse=True, return_counts=True)
        lengths[:, component] = -np.log2(counts / len(flat))[inverse]
    return lengths.reshape(values.shape)


def _side_by_side(values: npt.NDArray[np.generic], wide: int, page_tokens: int) -> npt.NDArray[np.generic]:
    """``(documents, tokens, components)`` to pages ``(pages, page_tokens, components * wide)``."""
    documents, tokens, components = values.shape
    joined = values.reshape(documents // wide, wide, tokens, components).transpose(0, 2, 3, 1)
    whole = joined.reshape(documents // wide, tokens, components * wide)[:, : tokens // page_tokens * page_tokens]
    return whole.reshape(-1, page_tokens, components * wide)


def rows_are_tokens(page_tokens: int, components: int) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
    """The layout of format version 1: three planes of a third of the components, rows are tokens."""
    geometry = picture_geometry(KVSpec(3, 1, components // 3, page_tokens, KVDtype.BFLOAT16))
    plane, channel = np.divmod(np.arange(components), components // 3)
    fold, column = np.divmod(channel, geometry.width)
    starts = np.array([geometry.layer_row_start(index) for index in range(3)])
    first_row = starts[plane] + fold * page_tokens
    rows = first_row[:, None] + np.arange(page_tokens)
    return rows * geometry.width + column[:, None], geometry.canvas_shape


def for_components(page_tokens: int, components: int) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
    """The layout of ``transform/components.py``."""
    geometry = component_geometry(KVSpec(3, 1, 1, page_tokens, KVDtype.BFLOAT16), components)
    return component_layout(geometry).numpy(), geometry.canvas_shape


def blocks(
    *, size: int = 32, scan: str = "diagonal", group_tokens: int = 16, chroma: str = "last", guards: bool = False
) -> Layout:
    """A layout by blocks, to try what each choice is worth.

    Args:
        size: of a block of luma.
        scan: of the 4 x 4 groups in a block: ``diagonal``, ``reverse`` (from the lower right) or ``raster``.
        group_tokens: tokens of a 4 x 4 group; it holds 16 over so many components.
        chroma: takes the components of least (``last``) or most (``first``) variance, or those ``beside`` its luma.
        guards: keep the groups at the corners that edge blocks are predicted from for the last components.
    """

    def layout(page_tokens: int, components: int) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
        geometry = component_geometry(KVSpec(3, 1, 1, page_tokens, KVDtype.BFLOAT16), components)
        width, height = geometry.width, geometry.height
        luma, luma_guard = _block_samples(width, height, size, scan)
        chroma_, chroma_guard = _block_samples(width // 2, height // 2, size // 2, scan)
        y, x = np.divmod(chroma_, width // 2)
        u = (height + y) * width + 2 * x
        both = np.stack([u, u + 1], axis=1)
        both_guard = np.stack([chroma_guard, chroma_guard], axis=1)
        if chroma == "beside":
            order = np.concatenate([luma.reshape(len(luma), -1), both.reshape(len(luma), -1)], axis=1).ravel()
        else:
            keep = (~luma_guard, ~both_guard) if guards else (np.ones_like(luma_guard), np.ones_like(both_guard))
            parts = [luma[keep[0]].ravel(), both[keep[1]].ravel()]
            rest = [luma[~keep[0]].ravel(), both[~keep[1]].ravel()]
            order = np.concatenate([*(parts if chroma == "last" else parts[::-1]), *rest])
        order = order[: components * page_tokens]
        per_group = 16 // group_tokens
        shape = (components // per_group, page_tokens // group_tokens, group_tokens, per_group)
        return order.reshape(shape).transpose(0, 3, 1, 2).reshape(components, page_tokens), geometry.canvas_shape

    return layout


def _block_samples(
    width: int, height: int, size: int, scan: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Plane indices ``(blocks, groups, 16)``, and which groups guard an edge."""
    across = size // 4
    group_y, group_x = np.divmod(np.arange(across * across), across)
    keys = {
        "diagonal": (-group_y, group_y + group_x),
        "reverse": (group_y, -group_y - group_x),
        "raster": (group_x, group_y),
    }
    order = np.lexsort(keys[scan])
    group_y, group_x = group_y[order], group_x[order]
    block_y, block_x = np.divmod(np.arange((height // size) * (width // size)), width // size)
    sample_y, sample_x = np.divmod(np.arange(16), 4)
    y = block_y[:, None, None] * size + group_y[:, None] * 4 + sample_y
    x = block_x[:, None, None] * size + group_x[:, None] * 4 + sample_x
    right, left = (group_y == 0) & (group_x == across - 1), (group_y == across - 1) & (group_x == 0)
    return y * width + x, (block_y == 0)[:, None] & right | (block_x == 0)[:, None] & left


@dataclasses.dataclass(frozen=True)
class Trial:
    """How pages are coded."""

    name: str
    layout: Layout = for_components
    low_bits: bool = True
    uniform_blocks: bool = True
    preset: str = "ultrafast"
    x265: tuple[str, ...] = ()
    inter: bool = False


def canvases_of(pages: Pages, layout: Layout) -> npt.NDArray[np.uint8]:
    count, tokens, components = pages.values.shape
    where, shape = layout(tokens, components)
    canvases = np.full((count, shape[0] * shape[1]), 128, np.uint8)
    canvases[:, where.ravel()] = pages.values.transpose(0, 2, 1).reshape(count, -1) + 128
    return canvases.reshape(count, *shape)


def measure(trial: Trial, groups: Iterable[Pages]) -> dict[str, object]:
    """Codes all pages of all groups, and checks that they come back."""
    values = coded = low = escapes = samples = pictures = 0
    ideal = encode_s = decode_s = 0.0
    for pages in groups:
        canvases = canvases_of(pages, trial.layout)
        if trial.inter:
            start = time.process_time()
            coded += _inter_bytes(canvases)
            encode_s += time.process_time() - start
        else:
            encoder = SoftwareEncoder(uniform_blocks=trial.uniform_blocks, preset=trial.preset, more_params=trial.x265)
            encoder.encode(canvases[:1])
            start = time.process_time()
            encoded = encoder.encode(canvases)
            encode_s += time.process_time() - start
            coded += sum(map(len, encoded.pictures))
            start = time.process_time()
            decoded = SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures)
            decode_s += time.process_time() - start
            if not np.array_equal(decoded, canvases):
                raise SystemExit(f"{trial.name}: pictures did not come back bit for bit")
        values += pages.values.size
        samples += canvases.size
        pictures += len(canvases)
        ideal += pages.ideal_bits
        low += pages.low_bits
        escapes += pages.escapes
    total = coded * 8 + low
    return {
        "trial": trial.name,
        "pictures": pictures,
        "samples_per_picture": samples // pictures,
        "bytes_per_picture": round(coded / pictures, 1),
        "ideal_bits_per_value": round(ideal / values, 4),
        "picture_bits_per_value": round(coded * 8 / values, 4),
        "low_bits_per_value": round(low / values, 4),
        "over_ideal_percent": round(100 * (total / ideal - 1), 2),
        "escapes_per_million": round(escapes / values * 1e6, 1),
        "over_ideal_with_escapes_percent": round(100 * ((total + escapes * ESCAPE_BITS) / ideal - 1), 2),
        "encode_mvalues_per_cpu_s": round(values / encode_s / 1e6, 2),
        "decode_mvalues_per_cpu_s": round(values / decode_s / 1e6, 1) if decode_s else None,
    }


def _inter_bytes(canvases: npt.NDArray[np.uint8]) -> int:
    """Bytes of one IDR and then pictures that may refer to the one before; parameter sets are a few bytes of it."""
    parameters = (
        "lossless=1:keyint=-1:bframes=0:ref=1:ctu=32:no-wpp=1:pools=none:frame-threads=1:no-info=1:log-level=none"
    )
    height, width = canvases.shape[1] * 2 // 3, canvases.shape[2]
    context = av.VideoCodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.thread_count = 1
    context.options = {"preset": "medium", "x265-params": parameters}
    packets = []
    for canvas in canvases:
        chroma = canvas[height:]
        planes = [canvas[:height].ravel(), chroma[:, 0::2].ravel(), chroma[:, 1::2].ravel()]
        planar = np.concatenate(planes).reshape(height * 3 // 2, width)
        packets += context.encode(av.VideoFrame.from_ndarray(planar, format="yuv420p"))
    return sum(packet.size for packet in [*packets, *context.encode(None)])


TODAY = Trial("rows are tokens, three planes", rows_are_tokens, low_bits=False, uniform_blocks=False)
FIGURE = (
    TODAY,
    dataclasses.replace(TODAY, name="rows are tokens, low bits", low_bits=True),
    Trial("components", low_bits=False),
    Trial("components, low bits"),
)
LAYOUTS = (
    dataclasses.replace(TODAY, low_bits=True, name="rows are tokens, three planes"),
    dataclasses.replace(TODAY, low_bits=True, name="rows are tokens, whole blocks only", uniform_blocks=True),
    Trial("components (diagonal, 16 tokens a group, chroma last, guards)"),
    Trial("no guards", blocks()),
    Trial("no guards, x265 may split", blocks(), uniform_blocks=False),
    Trial("groups in reverse diagonal order", blocks(scan="reverse", guards=True)),
    Trial("groups in raster order", blocks(scan="raster", guards=True)),
    Trial("blocks of 16, x265 may split", blocks(size=16), uniform_blocks=False),
    Trial("8 tokens a group", blocks(group_tokens=8, guards=True)),
    Trial("4 tokens a group", blocks(group_tokens=4, guards=True)),
    Trial("1 token a group", blocks(group_tokens=1, guards=True)),
    Trial("chroma takes the widest components", blocks(chroma="first", guards=True)),
    Trial("chroma takes what comes beside its luma", blocks(chroma="beside")),
)
ENCODERS = (
    Trial("components, whole blocks"),
    Trial("x265 may split to 16", uniform_blocks=False),
    Trial("x265 may split to 8", uniform_blocks=False, x265=("min-cu-size=8", "tu-intra-depth=4")),
    Trial("CTU 64", uniform_blocks=False, x265=("ctu=64",)),
    Trial("CTU 16", uniform_blocks=False, x265=("ctu=16", "max-tu-size=16")),
    Trial("transforms of 16", x265=("max-tu-size=16",)),
    Trial("rd 4", x265=("rd=4",)),
    Trial("rd 6, all intra modes", x265=("rd=6", "no-fast-intra=1")),
    Trial("no strong smoothing", x265=("no-strong-intra-smoothing=1",)),
    Trial("constrained intra", x265=("constrained-intra=1",)),
    Trial("transform skip allowed", x265=("tskip=1",)),
    Trial("preset superfast, may split", uniform_blocks=False, preset="superfast"),
    Trial("preset medium, may split", uniform_blocks=False, preset="medium"),
    Trial("rows are tokens, preset medium", rows_are_tokens, uniform_blocks=False, preset="medium"),
    Trial("a page may refer to the one before it, preset medium", inter=True),
)


def rows_of(part: str, data: Mapping[tuple[str, str], Array]) -> Iterable[dict[str, object]]:
    """The rows of one part of the study, one at a time."""
    if part == "figure":
        for (name, side), values in data.items():
            for wide in (1, 4):
                baseline: dict[str, object] = {}
                for trial in FIGURE:
                    found = measure(trial, pages_of(values, low_bits=trial.low_bits, wide=wide))
                    baseline = baseline or found
                    for key in ("encode_mvalues_per_cpu_s", "decode_mvalues_per_cpu_s"):
                        found[f"{key}_to_first"] = round(float(str(found[key])) / float(str(baseline[key])), 2)
                    yield {"part": part, "data": name, "side": side, "components": 768 * wide, **found}
    elif part == "size":
        for (name, side), values in data.items():
            for wide in (1, 4):
                for tokens in (32, 64, 128, 256):
                    pages = pages_of(values, low_bits=True, page_tokens=tokens, wide=wide)
                    row = {"part": part, "data": name, "side": side, "components": 768 * wide, "page_tokens": tokens}
                    yield {**row, **measure(Trial("components, low bits"), pages)}
    else:
        for trial in LAYOUTS if part == "layout" else ENCODERS:
            every = 1 if trial.inter else 4
            groups = [
                pages for values in data.values() for pages in pages_of(values, low_bits=trial.low_bits, every=every)
            ]
            yield {"part": part, "data": ", ".join(f"{name} {side}" for name, side in data), **measure(trial, groups)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coefficients", nargs="*", type=pathlib.Path, default=[])
    parser.add_argument("--part", nargs="*", default=["figure", "layout", "encoder", "size"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data: dict[tuple[str, str], Array] = {}
    for path in arguments.coefficients:
        with np.load(path) as arrays:
            data.update({(path.stem, side): arrays[side].astype(np.int32) for side in "kv"})
    if not data:
        data = {(f"synthetic-{tier}", side): synthetic(tier, side) for tier in TIERS for side in "kv"}
    rows = []
    for part in arguments.part:
        few = {key: values for index, (key, values) in enumerate(data.items()) if index in (0, len(data) - 1)}
        for row in rows_of(part, data if part == "figure" else few):
            print(row, flush=True)
            rows.append(row)
    print(record("canvas", rows))


if __name__ == "__main__":
    main()
