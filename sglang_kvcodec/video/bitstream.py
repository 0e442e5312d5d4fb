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


def nal_type(unit: bytes | memoryview) -> int:
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


class _Bits:
    """Reads the fields of a NAL unit without emulation prevention (7.2, 9.2)."""

    def __init__(self, raw: bytes, first_byte: int) -> None:
        self._value = int.from_bytes(raw[first_byte:], "big")
        self._left = 8 * max(0, len(raw) - first_byte)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise CodecError("a parameter set ends early")
        return self._value >> self._left & (1 << count) - 1

    def exp_golomb(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros | self.take(zeros)) - 1


def picture_size(parameter_sets: bytes) -> tuple[int, int]:
    """Width and height that the SPS states, in luma samples.

    A hardware decoder has to be made for a size, and would scale pictures of another one to it without a word.

    Raises:
        CodecError: not VPS, SPS and PPS of 8-bit 4:2:0 pictures without a conformance window.
    """
    units = nal_units(parameter_sets)
    if [nal_type(unit) for unit in units if unit] != [NAL_VPS, NAL_SPS, NAL_PPS]:
        raise CodecError("parameter sets that are not VPS, SPS and PPS")
    raw = re.sub(rb"\x00\x00\x03", b"\0\0", units[1])
    start = _Bits(raw, _NAL_HEADER_BYTES)
    start.take(4)
    if start.take(3):
        raise CodecError("an SPS of several temporal layers")
    bits = _Bits(raw, _NAL_HEADER_BYTES + 1 + 12)
    bits.exp_golomb()
    chroma_format, width, height = (bits.exp_golomb() for _ in range(3))
    if chroma_format != 1 or bits.take(1) or bits.exp_golomb() or bits.exp_golomb():
        raise CodecError("pictures that are not plain 8-bit 4:2:0, or are cropped")
    return width, height


def check_idr(picture: bytes | memoryview) -> None:
    """Refuses what does not begin as a picture alone does; reads no further, for the digest judges what comes out.

    Raises:
        CodecError: not an IDR slice behind a start code.
    """
    header = len(START_CODE)
    if picture[:header] != START_CODE or nal_type(picture[header : header + 1] or b"\0") not in (
        NAL_IDR_W_RADL,
        NAL_IDR_N_LP,
    ):
        raise CodecError("a picture that does not begin with an IDR slice")


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
