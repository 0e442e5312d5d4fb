"""What a decoder is given in one call: parameter sets and the pictures that share them, checked before it sees them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.bitstream import NAL_HEADER_BYTES, NAL_IDR_N_LP, NAL_IDR_W_RADL, START_CODE, nal_header
from sglang_kvcodec.video.parameter_sets import FieldReader, PictureFormat, check_parameter_sets

_PARAMETER_SETS = 3
_SLICE_HEADER_END = len(START_CODE) + NAL_HEADER_BYTES + 3
"""The longest slice header that :func:`_check_slice_header` lets pass has 23 bits, 13 of them for the QP. None of its
bytes comes of emulation prevention: the first is not zero, and then no QP has so many zeros."""
_COLUMNS = 8192
_IDR_HEADERS = (nal_header(NAL_IDR_W_RADL), nal_header(NAL_IDR_N_LP))
_INTRA = 2


class SegmentMemory:
    """Where the segments of one decoder are joined, one after the other."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def join(self, pieces: Sequence[bytes | memoryview]) -> npt.NDArray[np.uint8]:
        """The pieces one behind the other, until the next call. NumPy lets other threads run while it copies."""
        size = sum(map(len, pieces))
        if len(self._bytes) < size:
            self._bytes = np.empty(size + size // 4, np.uint8)
        start = 0
        for piece in pieces:
            self._bytes[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
            start += len(piece)
        return self._bytes[:size]


def checked_segment(
    parameter_sets: bytes, pictures: Sequence[bytes | memoryview], memory: SegmentMemory | None = None
) -> tuple[PictureFormat, npt.NDArray[np.uint8]]:
    """Joins a segment, in which a decoder finds nothing but one slice of each picture behind the parameter sets.

    See :func:`joined_segment` and :func:`check_units`. What is coded in the slices is not looked at: digests judge what
    comes out.

    Raises:
        CodecError: as these.
    """
    picture_format, segment = joined_segment(parameter_sets, pictures, memory)
    check_units(segment, len(pictures))
    return picture_format, segment


def joined_segment(
    parameter_sets: bytes, pictures: Sequence[bytes | memoryview], memory: SegmentMemory | None = None
) -> tuple[PictureFormat, npt.NDArray[np.uint8]]:
    """A segment whose parameter sets and first slice headers are checked, and nothing else.

    Args:
        parameter_sets: VPS, SPS and PPS.
        pictures: each with its start code.
        memory: to join them in.

    Raises:
        CodecError: parameter sets that are not for our pictures, no pictures, or one that is not a single IDR slice.
    """
    picture_format = check_parameter_sets(parameter_sets)
    if not pictures:
        raise CodecError("a segment without pictures")
    for picture in pictures:
        if picture[: len(START_CODE)] != START_CODE:
            raise CodecError("a picture that does not begin with an IDR slice: there is no start code")
        _check_slice_header(bytes(picture[len(START_CODE) : _SLICE_HEADER_END]), picture_format)
    return picture_format, (memory or SegmentMemory()).join([parameter_sets, *pictures])


def check_units(segment: npt.NDArray[np.uint8], pictures: int) -> None:
    """Refuses a segment with more NAL units than its parts should have. Other threads run meanwhile.

    A second parameter set would set the decoder up anew, for whatever it says.

    Raises:
        CodecError: it has.
    """
    # Each part begins with one: more of them lie within, or where two pictures meet.
    units = count_start_codes(segment)
    if units != _PARAMETER_SETS + pictures:
        raise CodecError(f"{units} NAL units in a segment of {pictures} pictures")


def count_start_codes(stream: npt.NDArray[np.uint8]) -> int:
    """How often the bytes 0, 0, 1 are in a stream.

    ``bytes.count`` takes five times as long, and lets no other thread run.
    """
    return sum(_count_at_even_places(stream[first:]) for first in (0, 1))


def _count_at_even_places(stream: npt.NDArray[np.uint8]) -> int:
    # In coded pictures one pair in 65536 is 0, 0. The minima of columns find those in one pass at the speed of memory;
    # only columns with a zero are looked at again.
    pairs = stream[: len(stream) // 2 * 2].view(np.uint16)
    rows = len(pairs) // _COLUMNS
    table = pairs[: rows * _COLUMNS].reshape(rows, _COLUMNS)
    columns = np.flatnonzero(table.min(axis=0, initial=1) == 0)
    in_row, in_column = np.nonzero(table[:, columns] == 0)
    rest = rows * _COLUMNS + np.flatnonzero(pairs[rows * _COLUMNS :] == 0)
    places = 2 * np.concatenate([in_row * _COLUMNS + columns[in_column], rest])
    return int(np.count_nonzero(stream[places[places + 2 < len(stream)] + 2] == 1))


@functools.lru_cache(4096)
def _check_slice_header(header: bytes, picture_format: PictureFormat) -> None:
    """Reads the header of the first slice of an IDR picture in full (7.3.6.1).

    Encoders write the same one for all pictures, so that this rarely runs.
    """
    if header[:NAL_HEADER_BYTES] not in _IDR_HEADERS:
        raise CodecError("a picture that does not begin with an IDR slice")
    fields = FieldReader(header[NAL_HEADER_BYTES:])
    fields.expect("first_slice_segment_in_pic_flag", 1, 1)
    fields.expect("no_output_of_prior_pics_flag", 1, 0)
    fields.unsigned("slice_pic_parameter_set_id", 0, 0)
    fields.unsigned("slice_type", _INTRA, _INTRA)
    has_offsets = fields.take(2) if picture_format.has_sample_adaptive_offset else 0  # of luma, of chroma
    fields.signed("slice_qp_delta", -picture_format.initial_qp, 51 - picture_format.initial_qp)
    if picture_format.filters_across_slices and (has_offsets or picture_format.has_deblocking):
        fields.flag()
    fields.align()
