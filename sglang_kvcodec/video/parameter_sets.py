"""Which VPS, SPS and PPS may reach a decoder (ITU-T H.265, 7.3.2.1 to 7.3.2.3, 7.3.3 and annex E).

They come from the network, and a decoder allocates and indexes by what they say: those of GPUs have been seen to take
their whole process along over sets that were damaged. So only sets pass that are of the narrow kind that encoders write
for our pictures, read to their last bit. What decides how much a decoder allocates or where it looks is bounded; which
of the coding tools that every decoder has are in use, is not.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.bitstream import (
    LEVEL_6_2,
    NAL_HEADER_BYTES,
    NAL_PPS,
    NAL_SPS,
    NAL_VPS,
    escaped,
    nal_header,
    nal_units,
    to_annexb,
    unescaped,
)

MAX_BYTES = 512
"""Of the three together; x265 writes about 90."""
MIN_SIDE, MAX_SIDE = 144, 8192
"""Of pictures, in luma samples: what hardware decoders are built for."""
MAX_PICTURE_BUFFER = 6
"""Pictures that a decoder may be asked to hold: what the standard allows where pictures are as large as their level
takes (A.4.2). Ours refer to none; x265 asks for as many as it would use otherwise."""
_LEVELS = frozenset({30, 60, 63, 90, 93, 120, 123, 150, 153, 156, 180, 183, LEVEL_6_2})
_MAIN = 1
_MAX_LEADING_ZEROS = 31
"""Of an Exp-Golomb code: no field of these is longer (9.2)."""
_LAST_KNOWN_SAR, _EXTENDED_SAR = 16, 255


class PictureFormat(NamedTuple):
    """What parameter sets say that the slices are read by.

    Attributes:
        width: of pictures, in luma samples.
        height: likewise.
        initial_qp: to which slices add their difference.
        has_sample_adaptive_offset: slices say whether they use it.
        has_deblocking: of all slices.
        filters_across_slices: slices may choose whether loop filters cross their edges.
    """

    width: int
    height: int
    initial_qp: int
    has_sample_adaptive_offset: bool
    has_deblocking: bool
    filters_across_slices: bool


class FieldReader:
    """Reads the fields of a NAL unit's payload, from which emulation prevention was taken out (7.2, 9.2).

    All methods raise ``CodecError`` for a payload that ends early.
    """

    def __init__(self, payload: bytes) -> None:
        self._value = int.from_bytes(payload, "big")
        self._left = 8 * len(payload)

    def take(self, count: int) -> int:
        """An unsigned number of so many bits."""
        self._left -= count
        if self._left < 0:
            raise CodecError("a parameter set or slice header ends early")
        return self._value >> self._left & (1 << count) - 1

    def flag(self) -> bool:
        """One bit."""
        return bool(self.take(1))

    def unsigned(self, name: str, low: int, high: int) -> int:
        """An Exp-Golomb number that has to lie between bounds, which may be reached."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > _MAX_LEADING_ZEROS:
                raise CodecError(f"{name} is no number")
        return _within(name, (1 << zeros | self.take(zeros)) - 1, low, high)

    def signed(self, name: str, low: int, high: int) -> int:
        """As :meth:`unsigned`, with the signed mapping of 9.2.2."""
        code = self.unsigned(name, 0, (1 << 32) - 2)
        return _within(name, (code + 1) // 2 if code % 2 else -(code // 2), low, high)

    def expect(self, name: str, count: int, value: int) -> None:
        """So many bits, which can have but one value."""
        if (found := self.take(count)) != value:
            raise CodecError(f"{name} is {found}, not {value}")

    def align(self) -> None:
        """A bit that is set, and clear ones up to the next byte."""
        self.expect("the bit before alignment", 1, 1)
        self.expect("the bits of alignment", self._left % 8, 0)

    def end(self) -> None:
        """The trailing bits, and nothing behind them."""
        self.align()
        if self._left:
            raise CodecError(f"{self._left // 8} bytes behind the end of a parameter set")


def _within(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise CodecError(f"{name} is {value}, not {low} to {high}")
    return value


def check_parameter_sets(parameter_sets: bytes) -> PictureFormat:
    """Refuses parameter sets that no encoder of ours writes; cheap for sets that were seen before.

    Raises:
        CodecError: not one VPS, SPS and PPS of progressive, 8-bit 4:2:0 pictures of one layer that may be coded without
            loss, decode alone and lie within the bounds above.
    """
    if len(parameter_sets) > MAX_BYTES:
        raise CodecError(f"parameter sets of {len(parameter_sets)} bytes")
    return _parse(bytes(parameter_sets))


@functools.lru_cache(64)
def _parse(parameter_sets: bytes) -> PictureFormat:
    units = nal_units(parameter_sets)
    if to_annexb(units) != parameter_sets:
        raise CodecError("parameter sets with other start codes than of four bytes")
    if [unit[:NAL_HEADER_BYTES] for unit in units] != [nal_header(kind) for kind in (NAL_VPS, NAL_SPS, NAL_PPS)]:
        raise CodecError("parameter sets that are not one VPS, SPS and PPS")
    vps, sps, pps = (_payload(unit) for unit in units)
    profile_tier_level, most_buffered = _parse_vps(vps)
    return _parse_pps(pps, _parse_sps(sps, profile_tier_level, most_buffered))


def _payload(unit: bytes) -> FieldReader:
    payload = unescaped(unit[NAL_HEADER_BYTES:])
    # There is but one way to write a payload: decoders do not agree on what the others mean.
    if escaped(payload) != unit[NAL_HEADER_BYTES:]:
        raise CodecError("a parameter set with wrong emulation prevention")
    return FieldReader(payload)


def _parse_vps(fields: FieldReader) -> tuple[int, int]:
    """profile_tier_level as a number, and how many pictures are buffered at most (7.3.2.1)."""
    fields.expect("vps_video_parameter_set_id", 4, 0)
    fields.expect("the base layer's flags", 2, 0b11)
    fields.expect("vps_max_layers_minus1", 6, 0)
    fields.expect("vps_max_sub_layers_minus1", 3, 0)
    fields.expect("vps_temporal_id_nesting_flag", 1, 1)
    fields.expect("vps_reserved_0xffff_16bits", 16, 0xFFFF)
    profile_tier_level = _parse_profile_tier_level(fields)
    most_buffered = _parse_buffering(fields, MAX_PICTURE_BUFFER)
    fields.expect("vps_max_layer_id", 6, 0)
    fields.unsigned("vps_num_layer_sets_minus1", 0, 0)
    if fields.flag():
        _parse_timing(fields)
        fields.unsigned("vps_num_hrd_parameters", 0, 0)
    fields.expect("vps_extension_flag", 1, 0)
    fields.end()
    return profile_tier_level, most_buffered


def _parse_profile_tier_level(fields: FieldReader) -> int:
    """All of it as a number, of Main profile and a level that there is (7.3.3)."""
    profile = fields.take(8)  # space, tier, profile
    if profile & ~0x20 != _MAIN:
        raise CodecError(f"profile {profile:#04x} is not Main")
    # Pictures of Main are also of Main 10, and may be of Main Still Picture. Others would give meaning to what follows.
    compatible = fields.take(32)
    if compatible & ~0x30000000 != 0x40000000:
        raise CodecError(f"profiles {compatible:#010x} are not those of Main")
    source = fields.take(4)  # progressive, interlaced, non-packed, frame only
    fields.expect("reserved bits of the profile", 44, 0)
    level = fields.take(8)
    if level not in _LEVELS:
        raise CodecError(f"level {level} is none that there is")
    return ((profile << 32 | compatible) << 4 | source) << 8 | level


def _parse_buffering(fields: FieldReader, most: int) -> int:
    """Pictures that are buffered at most, of one temporal layer."""
    fields.flag()  # whether all temporal layers follow
    buffered = fields.unsigned("max_dec_pic_buffering_minus1", 0, most - 1) + 1
    fields.unsigned("max_num_reorder_pics", 0, buffered - 1)
    fields.unsigned("max_latency_increase_plus1", 0, (1 << 32) - 2)
    return buffered


def _parse_timing(fields: FieldReader) -> None:
    """Clock of VPS or VUI, which says nothing to us; but decoders divide by it."""
    if not fields.take(32) or not fields.take(32):
        raise CodecError("a clock that stands still")
    if fields.flag():
        fields.unsigned("num_ticks_poc_diff_one_minus1", 0, (1 << 32) - 2)


class _Sequence(NamedTuple):
    """What the PPS is read by, of the SPS."""

    width: int
    height: int
    log2_largest_block: int
    log2_smallest_block: int
    has_sample_adaptive_offset: bool


def _parse_sps(fields: FieldReader, profile_tier_level: int, most_buffered: int) -> _Sequence:
    """7.3.2.2."""
    fields.expect("sps_video_parameter_set_id", 4, 0)
    fields.expect("sps_max_sub_layers_minus1", 3, 0)
    fields.expect("sps_temporal_id_nesting_flag", 1, 1)
    if _parse_profile_tier_level(fields) != profile_tier_level:
        raise CodecError("VPS and SPS state different profiles")
    fields.unsigned("sps_seq_parameter_set_id", 0, 0)
    fields.unsigned("chroma_format_idc", 1, 1)
    width = fields.unsigned("the width of pictures", MIN_SIDE, MAX_SIDE)
    height = fields.unsigned("the height of pictures", MIN_SIDE, MAX_SIDE)
    fields.expect("conformance_window_flag", 1, 0)
    fields.unsigned("bit_depth_luma_minus8", 0, 0)
    fields.unsigned("bit_depth_chroma_minus8", 0, 0)
    log2_counter = 4 + fields.unsigned("log2_max_pic_order_cnt_lsb_minus4", 0, 12)
    buffered = _parse_buffering(fields, most_buffered)
    smallest, largest = _parse_blocks(fields)
    if width % (1 << smallest) or height % (1 << smallest):
        raise CodecError(f"pictures of {width}x{height} are not whole blocks of {1 << smallest}")
    fields.expect("scaling_list_enabled_flag", 1, 0)
    fields.flag()  # asymmetric motion partitions
    has_sample_adaptive_offset = fields.flag()
    fields.expect("pcm_enabled_flag", 1, 0)
    if fields.unsigned("num_short_term_ref_pic_sets", 0, 1):
        _parse_reference_set(fields, buffered, 1 << log2_counter - 1)
    fields.expect("long_term_ref_pics_present_flag", 1, 0)
    fields.take(2)  # temporal motion vector prediction, strong intra smoothing
    if fields.flag():
        _parse_vui(fields)
    fields.expect("sps_extension_present_flag", 1, 0)
    fields.end()
    return _Sequence(width, height, largest, smallest, has_sample_adaptive_offset)


def _parse_blocks(fields: FieldReader) -> tuple[int, int]:
    """Binary logarithms of the sides of the smallest and the largest coding block (7.4.3.2.1)."""
    smallest = 3 + fields.unsigned("log2_min_luma_coding_block_size_minus3", 0, 3)
    largest = smallest + fields.unsigned("log2_diff_max_min_luma_coding_block_size", max(0, 4 - smallest), 6 - smallest)
    smallest_transform = 2 + fields.unsigned("log2_min_luma_transform_block_size_minus2", 0, min(smallest - 3, 3))
    fields.unsigned("log2_diff_max_min_luma_transform_block_size", 0, min(largest, 5) - smallest_transform)
    for name in ("max_transform_hierarchy_depth_inter", "max_transform_hierarchy_depth_intra"):
        fields.unsigned(name, 0, largest - smallest_transform)
    return smallest, largest


def _parse_reference_set(fields: FieldReader, buffered: int, most_distance: int) -> None:
    """One short-term reference picture set, of earlier pictures, which NVENC may state without using it (7.3.7)."""
    count = fields.unsigned("num_negative_pics", 0, buffered - 1)
    fields.unsigned("num_positive_pics", 0, 0)
    for _ in range(count):
        fields.unsigned("delta_poc_s0_minus1", 0, most_distance - 1)
        fields.flag()


def _parse_vui(fields: FieldReader) -> None:
    """What a player would like to know, in full and without a buffer model (E.2.1)."""
    if fields.flag():
        _parse_aspect_ratio(fields)
    if fields.flag():
        fields.flag()  # overscan
    if fields.flag():
        fields.take(4)  # video format, full range
        if fields.flag():
            fields.take(24)  # colours
    if fields.flag():
        for name in ("chroma_sample_loc_type_top_field", "chroma_sample_loc_type_bottom_field"):
            fields.unsigned(name, 0, 5)
    fields.expect("neutral_chroma_indication_flag, field_seq_flag and frame_field_info_present_flag", 3, 0)
    # PyNvVideoCodec crops or scales by it.
    fields.expect("default_display_window_flag", 1, 0)
    if fields.flag():
        _parse_timing(fields)
        fields.expect("vui_hrd_parameters_present_flag", 1, 0)
    if fields.flag():
        fields.expect("tiles_fixed_structure_flag", 1, 0)
        fields.take(2)  # motion vectors over picture boundaries, restricted lists
        fields.unsigned("min_spatial_segmentation_idc", 0, 4095)
        for name in ("max_bytes_per_pic_denom", "max_bits_per_min_cu_denom"):
            fields.unsigned(name, 0, 16)
        for name in ("log2_max_mv_length_horizontal", "log2_max_mv_length_vertical"):
            fields.unsigned(name, 0, 15)


def _parse_aspect_ratio(fields: FieldReader) -> None:
    """One of table E.1, or two numbers; those are divided by."""
    known = fields.take(8)
    if known == _EXTENDED_SAR:
        if not fields.take(16) or not fields.take(16):
            raise CodecError("samples without a side")
    elif known > _LAST_KNOWN_SAR:
        raise CodecError(f"aspect_ratio_idc is {known}, which is reserved")


def _parse_pps(fields: FieldReader, sequence: _Sequence) -> PictureFormat:
    """7.3.2.3. What slices would be given more fields by is refused, so that their headers can be read in full."""
    fields.unsigned("pps_pic_parameter_set_id", 0, 0)
    fields.unsigned("pps_seq_parameter_set_id", 0, 0)
    fields.expect("dependent_slice_segments_enabled_flag and output_flag_present_flag", 2, 0)
    fields.expect("num_extra_slice_header_bits", 3, 0)
    fields.take(2)  # sign data hiding, choice of initial contexts
    for name in ("num_ref_idx_l0_default_active_minus1", "num_ref_idx_l1_default_active_minus1"):
        fields.unsigned(name, 0, 14)
    initial_qp = 26 + fields.signed("init_qp_minus26", -26, 25)
    fields.take(2)  # constrained intra prediction, transform skip
    if fields.flag():
        depth = sequence.log2_largest_block - sequence.log2_smallest_block
        fields.unsigned("diff_cu_qp_delta_depth", 0, depth)
    for name in ("pps_cb_qp_offset", "pps_cr_qp_offset"):
        fields.signed(name, -12, 12)
    fields.expect("pps_slice_chroma_qp_offsets_present_flag", 1, 0)
    fields.take(2)  # weighted prediction
    fields.expect("transquant_bypass_enabled_flag", 1, 1)
    fields.expect("tiles_enabled_flag and entropy_coding_sync_enabled_flag", 2, 0)
    filters_across_slices = fields.flag()
    has_deblocking = True
    if fields.flag():
        fields.expect("deblocking_filter_override_enabled_flag", 1, 0)
        has_deblocking = not fields.flag()
        if has_deblocking:
            for name in ("pps_beta_offset_div2", "pps_tc_offset_div2"):
                fields.signed(name, -6, 6)
    fields.expect("pps_scaling_list_data_present_flag", 1, 0)
    fields.flag()  # changes of reference lists
    fields.unsigned("log2_parallel_merge_level_minus2", 0, sequence.log2_largest_block - 2)
    fields.expect("slice_segment_header_extension_present_flag and pps_extension_present_flag", 2, 0)
    fields.end()
    return PictureFormat(
        sequence.width,
        sequence.height,
        initial_qp,
        sequence.has_sample_adaptive_offset,
        has_deblocking,
        filters_across_slices,
    )
