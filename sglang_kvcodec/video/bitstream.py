"""HEVC byte streams: NAL units, and the level that parameter sets state (ITU-T H.265, 7.3 and annexes A, B)."""

from __future__ import annotations

import re

from sglang_kvcodec.errors import CodecError

START_CODE = b"\0\0\0\1"
NAL_IDR_W_RADL, NAL_IDR_N_LP = 19, 20
NAL_VPS, NAL_SPS, NAL_PPS = 32, 33, 34
LEVEL_6_2 = 186
"""general_level_idc of level 6.2: the highest a decoder can be built for."""

NAL_HEADER_BYTES = 2
_LEVEL_AT = {NAL_VPS: NAL_HEADER_BYTES + 4 + 11, NAL_SPS: NAL_HEADER_BYTES + 1 + 11}
"""Where general_level_idc lies in a NAL unit without emulation prevention: byte 11 of profile_tier_level."""


def nal_units(stream: bytes) -> list[bytes]:
    """The NAL units of an Annex B stream, without start codes."""
    pieces = re.split(rb"\x00\x00+\x01", stream)
    if pieces[0].strip(b"\0"):
        raise CodecError("not an Annex B stream")
    # A NAL unit never ends in a zero byte: what is there belongs to the next start code.
    return [piece.rstrip(b"\0") for piece in pieces[1:]]


def nal_type(unit: bytes | memoryview) -> int:
    """nal_unit_type of a NAL unit without start code."""
    return unit[0] >> 1 & 0x3F


def nal_header(kind: int) -> bytes:
    """Of a NAL unit of the base layer and the lowest temporal layer."""
    return bytes([kind << 1, 1])


def escaped(payload: bytes) -> bytes:
    """With emulation prevention: no start code is in it (7.4.2). Not for a payload that ends in a zero byte."""
    return re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\0\0\3", payload)


def unescaped(payload: bytes) -> bytes:
    """Without emulation prevention."""
    return re.sub(rb"\x00\x00\x03", b"\0\0", payload)


def to_annexb(units: list[bytes]) -> bytes:
    """The inverse of :func:`nal_units`."""
    return b"".join(START_CODE + unit for unit in units)


def with_level(unit: bytes, level_idc: int) -> bytes:
    """A VPS or SPS with another general_level_idc.

    x265 states level 8.5 ("no limit") for every lossless stream, which a hardware decoder may refuse.
    """
    raw = bytearray(unescaped(unit))
    raw[_LEVEL_AT[nal_type(unit)]] = level_idc
    return escaped(bytes(raw))


def split_access_unit(stream: bytes) -> tuple[bytes, bytes]:
    """One coded IDR picture as an encoder gives it, split.

    Returns:
        VPS, SPS and PPS at level 6.2, and the picture's slice, both in Annex B form.

    Raises:
        CodecError: anything else than VPS, SPS, PPS and one IDR slice is there, or one of them is missing.
    """
    units = nal_units(stream)
    kinds = [nal_type(unit) for unit in units]
    if kinds[:3] != [NAL_VPS, NAL_SPS, NAL_PPS] or kinds[3:] not in ([NAL_IDR_W_RADL], [NAL_IDR_N_LP]):
        raise CodecError(f"the encoder gave NAL units {kinds} where parameter sets and an IDR picture were expected")
    sets = [with_level(units[0], LEVEL_6_2), with_level(units[1], LEVEL_6_2), units[2]]
    return to_annexb(sets), to_annexb(units[3:])
