"""Calibration artifacts, up to the transform that uses one.

The first byte of an input says what the rest is:

0. the bytes of an artifact.
1. its JSON text, with the tensors of a sound one.
2. the header of the safetensors file, with the data of a sound one.
3. pairs of bytes, each of which puts another value into one place of a sound JSON text, in its canonical form.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

import safetensors.numpy

from fuzzing.pages import GOLDEN
from fuzzing.target import Target, require
from sglang_kvcodec.errors import ForeignPageError, FormatError, UnsupportedError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVDtype, KVSpec

RAW, TEXT, HEADER, EDITS = range(4)
_LARGEST_WIDTH = 4096
"""Values of a block: a larger basis is left alone, for its sound transform takes long to make."""

_MOST_EDITS = 6
_VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "13", "65536", "65537", "9" * 40),
    *("0.0", "-0.0", "0.5", "1e-320", "1e300", "1e999", "-1e999", "NaN", "[]", "{}", "[[1, 2]]", "[0.5]"),
    *('""', '"key"', '"latent"', '"high"', '"\\ud800"', '"' + "00" * 32 + '"', '{"key": [0.5]}', "[" * 50 + "]" * 50),
)


@functools.cache
def _sound() -> bytes:
    return min((path.read_bytes() for path in GOLDEN.glob("calibrated/*.safetensors")), key=len)


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def artifact_of(data: bytes) -> bytes:
    """The artifact that an input is."""
    kind, rest = (data[0] % 4, data[1:]) if data else (RAW, b"")
    if kind == TEXT:
        return _with_text(rest.decode("utf-8", "replace"))
    if kind == EDITS:
        return _with_text(_edited(rest))
    if kind == HEADER:
        return len(rest).to_bytes(8, "little") + rest + _sound()[_header_end(_sound()) :]
    return rest


def _text() -> str:
    return str(json.loads(_sound()[8 : _header_end(_sound())])["__metadata__"]["kvcodec"])


def _with_text(text: str) -> bytes:
    return safetensors.numpy.save(safetensors.numpy.load(_sound()), metadata={"kvcodec": text})


def _edited(pairs: bytes) -> str:
    fields = json.loads(_text())
    for place, value in zip(pairs[: 2 * _MOST_EDITS : 2], pairs[1::2], strict=False):
        holders = list(_holders(fields))
        holder, name = holders[place % len(holders)]
        other = holders[value % len(holders)][0]
        # A copy, so that nothing holds itself.
        holder[name] = json.loads(_VALUES[value]) if value < len(_VALUES) else copy.deepcopy(other)
        fields = fields or {"": None}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value, as what holds it and under which name, the outer ones first."""
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield value, name
        yield from _holders(value[name])


def check_calibration(data: bytes) -> bool:
    """What is accepted is written again to the byte, and codes a page of its shape or is refused for it."""
    data = artifact_of(data)
    try:
        calibration = Calibration.from_bytes(data)
    except FormatError:
        return False
    require(calibration.encoded == data, "an artifact with a second form")
    layout = calibration.layout
    if calibration.layers_per_block * layout.channels <= _LARGEST_WIDTH:
        _check_use(
            calibration, KVSpec(layout.layers, layout.kv_heads, layout.head_dim, 16, KVDtype.BFLOAT16, layout.sides)
        )
    return True


def _check_use(calibration: Calibration, spec: KVSpec) -> None:
    from sglang_kvcodec.transform.klt import KltTransform

    for tier in calibration.tiers:
        try:
            transform = KltTransform(spec, calibration, tier)
        except (ForeignPageError, UnsupportedError):
            continue
        require(transform.canvas_shape[0] <= 3 * 8192 // 2, f"a canvas of {transform.canvas_shape}")


def _seeds() -> list[bytes]:
    from sglang_kvcodec.testing.calibrations import random_calibration

    sound = _sound()
    tiny = random_calibration(KVSpec(2, 1, 2, 16, KVDtype.BFLOAT16)).encoded
    header = sound[8 : _header_end(sound)]
    whole = [bytes([RAW]) + tiny, bytes([RAW]) + sound]
    return [*whole, bytes([TEXT]) + _text().encode(), bytes([HEADER]) + header, bytes([EDITS, 0, 255])]


TARGET = Target(
    "calibration",
    "calibration artifacts, up to the transform that uses one",
    check_calibration,
    _seeds,
    (b"NaN", b"1e999", b"-0.0", b"null", b"true", b"[]", b"{}", b"[[", b"]]", b'"', b":", b",", b"\\ud800", b"9" * 40),
)
