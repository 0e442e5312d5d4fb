"""Calibrated pages of every released format, made once by scripts/make-golden, read as docs/format.md says.

The reader here shares no code with the transform: NumPy, float64, and the document.
"""

import pathlib
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch

from sglang_kvcodec.flow.page_codec import GroupDecoder
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder

OBJECTS = sorted(pathlib.Path(__file__).parent.glob("golden/calibrated/*.kvpo"))


def canvas_bytes_in_order(width, height):
    """Flat indices into a canvas in the order in which components fill it."""

    def blocks(plane_width, plane_height, size):
        plain, guards = [], []
        for block_y in range(plane_height // size):
            for block_x in range(plane_width // size):
                groups = [(y, x) for y in range(size // 4) for x in range(size // 4)]
                groups.sort(key=lambda group: (group[0] + group[1], -group[0]))
                places = {False: [], True: []}
                for y, x in groups:
                    last = size // 4 - 1
                    guard = (block_y == 0 and (y, x) == (0, last)) or (block_x == 0 and (y, x) == (last, 0))
                    top, left = block_y * size + 4 * y, block_x * size + 4 * x
                    places[guard] += [(top + i, left + j) for i in range(4) for j in range(4)]
                plain.append(places[False])
                guards.append(places[True])
        return plain, guards

    luma, luma_guards = blocks(width, height, 32)
    chroma, chroma_guards = blocks(width // 2, height // 2, 16)

    def luma_at(block):
        return [y * width + x for y, x in block]

    def chroma_at(block):
        return [(height + y) * width + 2 * x + v for v in (0, 1) for y, x in block]

    parts = [map(luma_at, luma), map(chroma_at, chroma), map(luma_at, luma_guards), map(chroma_at, chroma_guards)]
    return [index for part in parts for block in part for index in block]


def gains_of(stored, blocks, tokens):
    """The gain of each block and token, and the stored bytes that follow."""
    row_bytes = -(-tokens // 2)
    levels = [[stored[b * row_bytes + t // 2] >> 4 * (t % 2) & 15 for t in range(tokens)] for b in range(blocks)]
    return 2.0 ** ((np.array(levels) - 12) / 2), stored[blocks * row_bytes :]


def numbers_of(side, stored, low_bits, tokens, canvas, order):
    """``q`` of each token and component."""
    high = np.array([int(canvas.reshape(-1)[order[i]]) - 128 for i in range(len(low_bits) * tokens)])
    high = high.reshape(len(low_bits), tokens).T.copy()
    entries = len(side.escapes) // 8
    positions = struct.unpack_from(f"<{entries}I", side.escapes)
    numbers = struct.unpack_from(f"<{entries}i", side.escapes, 4 * entries)
    for position, number in zip(positions, numbers, strict=True):
        high[position // len(low_bits), position % len(low_bits)] = number
    codes, at, row_bytes = np.zeros_like(high), 0, -(-tokens // 8)
    for component, count in enumerate(int(n) for n in low_bits):
        low = np.zeros(tokens, np.int64)
        for bit in range(count):
            row = np.frombuffer(stored, np.uint8, row_bytes, at)
            at += row_bytes
            low |= np.unpackbits(row, bitorder="little")[:tokens].astype(np.int64) << bit
        codes[:, component] = high[:, component] * 2**count + low - (2 ** (count - 1) if count else 0)
    assert at == len(stored)
    return codes


def by_rank(counts):
    """``(block, rank)`` of each component of a group."""
    return sorted(((b, r) for b, count in enumerate(counts) for r in range(count)), key=lambda each: (each[1], each[0]))


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_a_golden_page_reads_as_the_document_says(path):
    page = PageObject(path.read_bytes())
    artifact = path.with_suffix(".safetensors").read_bytes()
    calibration = Calibration.from_bytes(artifact)
    header, spec = page.header, page.header.spec
    assert header.calibration_digest == calibration.digest
    tensors, tier = safetensors.numpy.load(artifact), header.profile_name
    transforms = PageTransforms(spec, tier, [calibration])
    decoder = GroupDecoder(transforms, open_decoder("software"))
    geometry = header.manifest.geometry
    order = canvas_bytes_in_order(geometry.width, geometry.height)
    assert len(set(order)) == len(order) == geometry.width * geometry.height * 3 // 2
    escapes, levels_seen = 0, set()
    for group in layer_groups(spec):
        blocks = [
            (index, first, layers)
            for index, (first, layers) in enumerate(calibration.blocks())
            if group.first_layer <= first < group.first_layer + group.layers
        ]
        for side in spec.sides:
            data, name = page.side_data(group.index, side), side.value
            escapes += len(data.escapes) // 8
            canvas = decoder.unpack([page], group.index, side)[0].canvas.numpy()
            low_bits = [tensors[f"{name}.{index}.low_bits.{tier}"] for index, _, _ in blocks]
            places = by_rank([len(bits) for bits in low_bits])
            merged = [low_bits[block][rank] for block, rank in places]
            low_bytes = int(sum(merged)) * -(-spec.page_tokens // 8)
            gains, stored = (
                gains_of(data.stored, len(blocks), spec.page_tokens)
                if len(data.stored) > low_bytes
                else (
                    np.ones((len(blocks), spec.page_tokens)),
                    data.stored,
                )
            )
            levels_seen |= set(gains.flatten())
            codes = numbers_of(data, stored, merged, spec.page_tokens, canvas, order)
            parts = []
            for number, (index, _, layers) in enumerate(blocks):
                columns = [at for at, (block, _) in enumerate(places) if block == number]
                synthesis = tensors[f"{name}.{index}.synthesis"].astype(np.float64)[: len(columns)]
                x = tensors[f"{name}.{index}.mean"] + data.picture.steps[number] * gains[number][:, None] * (
                    codes[:, columns] @ synthesis
                )
                parts.append(x.reshape(spec.page_tokens, layers, spec.kv_heads, spec.head_dim))
            values = np.concatenate(parts, axis=1)
            rope = calibration.rope
            if side is Side.KEY and rope is not None:
                positions = header.first_position + np.arange(spec.page_tokens)
                angles = positions[:, None] * np.array(rope.inverse_frequencies)
                cos, sin = (rope.scale * f(angles)[:, None, None] for f in (np.cos, np.sin))
                half = rope.rotary_dim // 2
                a, b = values[..., :half].copy(), values[..., half : rope.rotary_dim].copy()
                values[..., :half], values[..., half : rope.rotary_dim] = a * cos - b * sin, b * cos + a * sin
            restored = decoder.decode([page], group.index, side)[0].transpose(0, 1).float().numpy()
            largest = float(torch.finfo(getattr(torch, spec.dtype.torch_name)).max)
            expected = np.clip(values, -largest, largest)
            tolerance = 2.0 ** -(spec.dtype.mantissa_bits + 1) * np.abs(expected) + 1e-3
            assert np.all(np.abs(restored - expected) <= tolerance)
    assert escapes > 0
    assert len(levels_seen) > 4


def test_both_are_there():
    assert [path.stem for path in OBJECTS] == ["bfloat16", "float8_e5m2-latent"]
