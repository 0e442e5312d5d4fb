"""HEVC byte streams: NAL units, parameter sets, and the level that they state (ITU-T H.265, 7.3 and annexes A, B)."""

from __future__ import annotations

import re

from sglang_kvcodec.errors import CodecError

START_CODE = b"\0\0\0\1"
NAL_IDR_W_RADL, NAL_IDR_N_LP = 19, 20
NAL_VPS, NAL_SPS, NAL_PPS = 32, 33, 34
LEVEL_6_2 = 186
"""general_level_idc of level 6.2: the highest a decoder can be built for."""

_NAL_HEADER_BYTES = 2
_LEVEL_AT = {NAL_VPS: _NAL_HEADER_BYTES + 4 + 11, NAL_SPS: _NAL_HEADER_BYTES + 1 + 11}
"""Where general_level_idc lies in a NAL unit without emulation prevention: byte 11 of profile_tier_level."""


def nal_units(stream: bytes) -> list[bytes]:
    """The NAL units of an Annex B stream, without start codes."""
    pieces = re.split(rb"\x00\x00+\x01", stream)
    if pieces[0].strip(b"\0"):
        raise CodecError("not an Annex B stream")
    # A NAL unit never ends in a zero byte: what is there belongs to the next start code.
    return [piece.rstrip(b"\0") for piece in pieces[1:]]


def nal_type(unit: bytes) -> int:
    """nal_unit_type of a NAL unit without start code."""
    return unit[0] >> 1 & 0x3F


def to_annexb(units: list[bytes]) -> bytes:
    """The inverse of :func:`nal_units`."""
    return b"".join(START_CODE + unit for unit in units)


def with_level(unit: bytes, level_idc: int) -> bytes:
    """A VPS or SPS with another general_level_idc.

    x265 states level 8.5 ("no limit") for every lossless stream, which a hardware decoder may refuse.
    """
    raw = bytearray(re.sub(rb"\x00\x00\x03", b"\0\0", unit))
    raw[_LEVEL_AT[nal_type(unit)]] = level_idc
    return re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\0\0\3", bytes(raw))


def split_access_unit(stream: bytes) -> tuple[bytes, bytes]:
    """One coded IDR picture as an encoder gives it, split.

    Returns:
        VPS, SPS and PPS at level 6.2, and the picture's slices, both in Annex B form.

    Raises:
        CodecError: anything else than VPS, SPS, PPS and IDR slices is there, or one of them is missing.
    """
    units = nal_units(stream)
    kinds = [nal_type(unit) for unit in units]
    if (
        kinds[:3] != [NAL_VPS, NAL_SPS, NAL_PPS]
        or not set(kinds[3:]) <= {NAL_IDR_W_RADL, NAL_IDR_N_LP}
        or not kinds[3:]
    ):
        raise CodecError(f"the encoder gave NAL units {kinds} where parameter sets and an IDR picture were expected")
    sets = [with_level(units[0], LEVEL_6_2), with_level(units[1], LEVEL_6_2), units[2]]
    return to_annexb(sets), to_annexb(units[3:])
