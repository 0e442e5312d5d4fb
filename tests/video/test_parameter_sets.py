"""What parameter sets may reach a decoder. Field by field, for those that no encoder writes are what matters."""

import contextlib
import fractions

import av
import numpy as np
import pytest
from hevc_kit import NVENC_CHANGES, se, sets_with, u, ue, units_of, x265_sets
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.testing.picture_codec import noise
from sglang_kvcodec.video.bitstream import nal_units, to_annexb
from sglang_kvcodec.video.parameter_sets import MAX_BYTES, FieldReader, check_parameter_sets
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder

START = b"\0\0\0\1"


def written(width, height, *, uniform_blocks=False, more_params=()):
    encoder = SoftwareEncoder(uniform_blocks=uniform_blocks, more_params=more_params)
    return encoder.encode(np.full((1, height * 3 // 2, width), 128, np.uint8)).parameter_sets


@pytest.mark.parametrize(
    ("width", "height"),
    [(192, 192), (256, 192), (192, 576), (1024, 512), (144, 160), (512, 1536), (8192, 192), (192, 8192)],
)
@pytest.mark.parametrize("uniform_blocks", [False, True])
def test_what_x265_writes_passes_and_states_the_size(width, height, uniform_blocks):
    sets = written(width, height, uniform_blocks=uniform_blocks and not width % 32)
    stated = check_parameter_sets(sets)
    assert (stated.width, stated.height) == (width, height)
    assert len(sets) < MAX_BYTES / 4


def test_every_size_of_pictures_passes():
    for width in range(192, 8193, 64):
        for height in (192, 8192, width):
            assert check_parameter_sets(sets_with({}, width=width, height=height))[:2] == (width, height)


def test_sets_written_field_by_field_are_those_of_x265():
    assert sets_with({}) == written(192, 192)
    assert sets_with({}, width=1024, height=256) == written(1024, 256)


@pytest.mark.parametrize(
    "more_params",
    [("sao=1", "deblock=1"), ("ctu=64",), ("ctu=16", "max-tu-size=16"), ("min-cu-size=8", "tu-intra-depth=4"),
     ("tskip=1",), ("constrained-intra=1",), ("no-strong-intra-smoothing=1",), ("signhide=1", "amp=1")],
)  # fmt: skip
def test_other_tools_of_x265_pass_and_decode(more_params):
    canvases = noise(2, 192, 192, 4.0)
    encoded = SoftwareEncoder(more_params=more_params).encode(canvases)
    np.testing.assert_array_equal(SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures), canvases)


@pytest.mark.parametrize(
    "left_out", [None, "sao", "reference_sets", "aspect_ratio", "video_signal", "timing", "qp_delta", "no_deblocking"]
)
def test_sets_as_of_nvenc_pass(left_out):
    changes = {name: bits for name, bits in NVENC_CHANGES.items() if name != left_out}
    stated = check_parameter_sets(sets_with(changes, width=512, height=256))
    assert (stated.width, stated.height, stated.initial_qp) == (512, 256, 26)
    assert stated.has_sample_adaptive_offset == (left_out != "sao")
    assert stated.has_deblocking == (left_out != "no_deblocking")


def test_the_picture_parameter_set_of_nvenc_is_as_assumed():
    """That of its lossy streams: it lacks nothing but the bypass."""
    vps, sps, pps = units_of(x265_sets() | NVENC_CHANGES)
    lossy = bytes.fromhex("4401c0f7c0cc90")
    with pytest.raises(CodecError, match="transquant_bypass_enabled_flag is 0"):
        check_parameter_sets(to_annexb([vps, sps, lossy]))
    assert pps == bytes.fromhex("4401c0f7c4cc90")


@pytest.mark.parametrize(
    "changes",
    [
        {"vps_level": u(8, 120), "sps_level": u(8, 120)},
        {"vps_space_tier_profile": u(8, 0x21), "sps_space_tier_profile": u(8, 0x21)},
        {"vps_buffered": ue(5), "sps_buffered": ue(5), "vps_reordered": ue(5)},
        {"vps_buffered": ue(0), "sps_buffered": ue(0)},
        {"width": ue(8192), "height": ue(8192)},
        {"sps_latency": ue(2**32 - 2)},
        {"larger_blocks": ue(2)},
        {"smallest_block": ue(3), "larger_blocks": ue(0), "smallest_transform": ue(3), "larger_transforms": ue(0)},
        {"counter": ue(12)},
        {"vui": u(1, 0), **dict.fromkeys(["aspect_ratio", "overscan", "video_signal", "chroma_location"], ""),
         **dict.fromkeys(["neutral_fields", "display_window", "timing", "hrd", "restrictions"], "")},
        {"aspect_ratio": u(1, 1) + u(8, 255) + u(16, 4) + u(16, 3), "chroma_location": u(1, 1) + ue(5) + ue(0)},
        {"timing": u(1, 0), "hrd": ""},
        {"vps_timing": u(1, 1) + u(32, 1) + u(32, 30) + u(1, 1) + ue(0) + ue(0)},
        {"restrictions": u(1, 1) + u(3, 0b010) + ue(4095) + ue(2) + ue(1) + ue(15) + ue(15)},
        {"initial_qp": se(-26), "cb_offset": se(-12), "cr_offset": se(12)},
        {"initial_qp": se(25), "no_deblocking": u(1, 0) + se(-6) + se(6)},
        {"deblocking_control": u(1, 0), "deblocking_override": "", "no_deblocking": ""},
        {"parallel_merge": ue(3), "weighted": u(2, 3), "lists_modification": u(1, 1)},
    ],
)  # fmt: skip
def test_what_does_not_matter_or_lies_within_bounds_passes(changes):
    check_parameter_sets(sets_with(changes))


REFUSED = [
    ("vps_video_parameter_set_id is 1", {"vps_id": u(4, 1)}),
    ("the base layer's flags is 1", {"base_layer": u(2, 1)}),
    ("vps_max_layers_minus1 is 1", {"layers": u(6, 1)}),
    ("vps_max_sub_layers_minus1 is 1", {"vps_sub_layers": u(3, 1)}),
    ("vps_temporal_id_nesting_flag is 0", {"vps_nesting": u(1, 0)}),
    ("vps_reserved_0xffff_16bits is 65534", {"vps_reserved": u(16, 0xFFFE)}),
    ("VPS and SPS state different profiles", {"vps_level": u(8, 183)}),
    ("level 255 is none that there is", {"vps_level": u(8, 255), "sps_level": u(8, 255)}),
    ("level 187 is none that there is", {"vps_level": u(8, 187), "sps_level": u(8, 187)}),
    ("level 0 is none that there is", {"vps_level": u(8, 0), "sps_level": u(8, 0)}),
    ("profile 0x02", {f"{each}_space_tier_profile": u(8, 2) for each in ("vps", "sps")}),
    ("profiles 0x68000000", {f"{each}_compatible": u(32, 0x68000000) for each in ("vps", "sps")}),
    ("reserved bits", {f"{each}_constraints": u(44, 1) for each in ("vps", "sps")}),
    ("profile 0x41 is", {"vps_space_tier_profile": u(8, 0x41), "sps_space_tier_profile": u(8, 0x41)}),
    ("profiles 0x20000000 are", {"vps_compatible": u(32, 0x20000000), "sps_compatible": u(32, 0x20000000)}),
    ("max_dec_pic_buffering_minus1 is 6", {"vps_buffered": ue(6), "sps_buffered": ue(6)}),
    ("max_dec_pic_buffering_minus1 is 15", {"vps_buffered": ue(15)}),
    ("max_dec_pic_buffering_minus1 is 3", {"sps_buffered": ue(3)}),  # more than the VPS
    ("max_dec_pic_buffering_minus1 is 4294967294", {"sps_buffered": ue(2**32 - 2)}),
    ("max_num_reorder_pics is 3", {"vps_reordered": ue(3)}),
    ("max_num_reorder_pics is 3", {"sps_reordered": ue(3)}),
    ("vps_max_layer_id is 1", {"max_layer_id": u(6, 1)}),
    ("vps_num_layer_sets_minus1 is 1", {"layer_sets": ue(1) + u(1, 1)}),
    ("vps_num_layer_sets_minus1 is 1023", {"layer_sets": ue(1023)}),
    ("vps_num_hrd_parameters is 1", {"vps_timing": u(1, 1) + u(32, 1) + u(32, 25) + u(1, 0) + ue(1)}),  # HRD
    ("a clock that stands still", {"vps_timing": u(1, 1) + u(32, 0) + u(32, 25) + u(1, 0) + ue(0)}),
    ("vps_extension_flag is 1", {"vps_extension": u(1, 1)}),
    ("vps_extension_flag is 1", {"vps_extension": u(1, 1) + u(8, 0)}),
    ("sps_video_parameter_set_id is 1", {"sps_vps_id": u(4, 1)}),
    ("sps_max_sub_layers_minus1 is 6", {"sps_sub_layers": u(3, 6)}),
    ("sps_temporal_id_nesting_flag is 0", {"sps_nesting": u(1, 0)}),
    ("sps_seq_parameter_set_id is 1", {"sps_id": ue(1)}),
    ("sps_seq_parameter_set_id is 16", {"sps_id": ue(16)}),
    ("chroma_format_idc is 0", {"chroma": ue(0)}),
    ("chroma_format_idc is 2", {"chroma": ue(2)}),
    ("chroma_format_idc is 3", {"chroma": ue(3) + u(1, 0)}),
    ("the width of pictures is 0", {"width": ue(0)}),
    ("the width of pictures is 128", {"width": ue(128)}),
    ("the width of pictures is 8208", {"width": ue(8208)}),
    ("the width of pictures is 1048576", {"width": ue(1 << 20)}),
    ("the width of pictures is 4294967294", {"width": ue(2**32 - 2)}),
    ("the height of pictures is 2147483648", {"height": ue(2**31)}),
    ("pictures of 192x200 are", {"height": ue(200)}),  # not whole blocks of 16
    ("conformance_window_flag is 1", {"cropping": u(1, 1) + 4 * ue(0)}),
    ("conformance_window_flag is 1", {"cropping": u(1, 1) + 4 * ue(1)}),
    ("bit_depth_luma_minus8 is 2", {"luma_bits": ue(2)}),
    ("bit_depth_chroma_minus8 is 2", {"chroma_bits": ue(2)}),
    ("log2_max_pic_order_cnt_lsb_minus4 is 13", {"counter": ue(13)}),
    ("log2_min_luma_coding_block_size_minus3 is 4", {"smallest_block": ue(4)}),
    ("log2_diff_max_min_luma_coding_block_size is 0", {"smallest_block": ue(0), "larger_blocks": ue(0)}),  # CTB of 8
    ("log2_diff_max_min_luma_coding_block_size is 3", {"larger_blocks": ue(3)}),  # CTB of 128
    ("log2_diff_max_min_luma_coding_block_size is 40", {"larger_blocks": ue(40)}),
    ("log2_min_luma_transform_block_size_minus2 is 2", {"smallest_transform": ue(2)}),  # as large as the smallest block
    ("log2_diff_max_min_luma_transform_block_size is 4", {"larger_transforms": ue(4)}),
    ("max_transform_hierarchy_depth_inter is 4", {"depth_inter": ue(4)}),
    ("max_transform_hierarchy_depth_intra is 4", {"depth_intra": ue(4)}),
    ("max_transform_hierarchy_depth_intra is 2147483648", {"depth_intra": ue(2**31)}),
    ("scaling_list_enabled_flag is 1", {"sps_scaling_lists": u(1, 1) + u(1, 0)}),
    ("pcm_enabled_flag is 1", {"pcm": u(1, 1) + u(8, 0x77) + ue(0) + ue(0) + u(1, 0)}),
    ("num_short_term_ref_pic_sets is 2", {"reference_sets": ue(2)}),
    ("num_short_term_ref_pic_sets is 64", {"reference_sets": ue(64)}),
    ("num_short_term_ref_pic_sets is 65", {"reference_sets": ue(65)}),
    ("num_negative_pics is 3", {"reference_sets": ue(1) + ue(3) + ue(0) + 3 * (ue(0) + u(1, 1))}),
    ("num_negative_pics is 16", {"reference_sets": ue(1) + ue(16)}),
    ("num_positive_pics is 1", {"reference_sets": ue(1) + ue(0) + ue(1) + ue(0) + u(1, 1)}),
    ("delta_poc_s0_minus1 is 32768", {"reference_sets": ue(1) + ue(1) + ue(0) + ue(1 << 15) + u(1, 1)}),
    ("long_term_ref_pics_present_flag is 1", {"long_term": u(1, 1) + ue(0)}),
    ("long_term_ref_pics_present_flag is 1", {"long_term": u(1, 1) + ue(33)}),
    ("samples without a side", {"aspect_ratio": u(1, 1) + u(8, 255) + u(16, 0) + u(16, 1)}),
    ("aspect_ratio_idc is 17", {"aspect_ratio": u(1, 1) + u(8, 17)}),
    ("chroma_sample_loc_type_top_field is 6", {"chroma_location": u(1, 1) + ue(6) + ue(0)}),
    ("frame_field_info_present_flag is 1", {"neutral_fields": u(3, 1)}),
    ("frame_field_info_present_flag is 2", {"neutral_fields": u(3, 2)}),
    ("frame_field_info_present_flag is 4", {"neutral_fields": u(3, 4)}),
    ("default_display_window_flag is 1", {"display_window": u(1, 1) + 4 * ue(16)}),
    ("a clock that stands still", {"timing": u(1, 1) + u(32, 1) + u(32, 0) + u(1, 0)}),
    ("num_ticks_poc_diff_one_minus1 is no number", {"timing": u(1, 1) + u(32, 1) + u(32, 25) + u(1, 1) + 64 * "0"}),
    ("vui_hrd_parameters_present_flag is 1", {"hrd": u(1, 1) + u(1, 0) + u(1, 0) + u(1, 1) + u(1, 0) + ue(0)}),
    ("tiles_fixed_structure_flag is 1", {"restrictions": u(1, 1) + u(3, 0b110) + 5 * ue(0)}),
    ("log2_max_mv_length_vertical is 17", {"restrictions": u(1, 1) + u(3, 0b010) + 4 * ue(0) + ue(17)}),
    ("min_spatial_segmentation_idc is 4096", {"restrictions": u(1, 1) + u(3, 0b010) + ue(4096) + 4 * ue(0)}),
    ("sps_extension_present_flag is 1", {"sps_extension": u(1, 1) + u(8, 0x80)}),
    ("pps_pic_parameter_set_id is 1", {"pps_id": ue(1)}),
    ("pps_pic_parameter_set_id is 64", {"pps_id": ue(64)}),
    ("pps_seq_parameter_set_id is 1", {"pps_sps_id": ue(1)}),
    ("output_flag_present_flag is 2", {"dependent_slices": u(1, 1)}),
    ("output_flag_present_flag is 1", {"output_flag": u(1, 1)}),
    ("num_extra_slice_header_bits is 1", {"extra_bits": u(3, 1)}),
    ("num_ref_idx_l0_default_active_minus1 is 15", {"references_0": ue(15)}),
    ("num_ref_idx_l1_default_active_minus1 is 1000", {"references_1": ue(1000)}),
    ("init_qp_minus26 is -27", {"initial_qp": se(-27)}),
    ("init_qp_minus26 is 26", {"initial_qp": se(26)}),
    ("init_qp_minus26 is -2147483647", {"initial_qp": se(-(2**31) + 1)}),
    ("diff_cu_qp_delta_depth is 2", {"qp_delta": u(1, 1) + ue(2)}),
    ("pps_cb_qp_offset is 13", {"cb_offset": se(13)}),
    ("pps_cr_qp_offset is -13", {"cr_offset": se(-13)}),
    ("pps_slice_chroma_qp_offsets_present_flag is 1", {"slice_chroma_offsets": u(1, 1)}),
    ("transquant_bypass_enabled_flag is 0", {"transquant_bypass": u(1, 0)}),
    ("entropy_coding_sync_enabled_flag is 2", {"tiles": u(1, 1), "wavefronts": u(1, 0) + ue(1) + ue(1) + u(2, 3)}),
    ("entropy_coding_sync_enabled_flag is 2", {"tiles": u(1, 1), "wavefronts": u(1, 0) + 2 * ue(1 << 20) + u(2, 3)}),
    ("entropy_coding_sync_enabled_flag is 1", {"wavefronts": u(1, 1)}),
    ("deblocking_filter_override_enabled_flag is 1", {"deblocking_override": u(1, 1)}),
    ("pps_beta_offset_div2 is 7", {"no_deblocking": u(1, 0) + se(7) + se(0)}),
    ("pps_tc_offset_div2 is -7", {"no_deblocking": u(1, 0) + se(0) + se(-7)}),
    ("pps_scaling_list_data_present_flag is 1", {"pps_scaling_lists": u(1, 1) + 24 * (u(1, 0) + ue(0))}),
    ("log2_parallel_merge_level_minus2 is 4", {"parallel_merge": ue(4)}),
    ("pps_extension_present_flag is 2", {"slice_extension": u(1, 1)}),
    ("pps_extension_present_flag is 1", {"pps_extension": u(1, 1) + u(8, 0x80)}),
    ("the bit before alignment is 0", {"pps_extension": u(1, 0) + u(8, 0)}),
]  # fmt: skip
"""Each would have a decoder allocate, index or divide by what is not as our encoders write it, or expect more."""


@pytest.mark.parametrize(("reason", "changes"), REFUSED)
def test_fields_that_our_encoders_do_not_write_are_refused(reason, changes):
    with pytest.raises(CodecError, match=reason):
        check_parameter_sets(sets_with(changes))


NUMBERS = [
    "vps_buffered", "vps_reordered", "vps_latency", "layer_sets",
    "sps_id", "chroma", "width", "height", "luma_bits", "chroma_bits", "counter",
    "sps_buffered", "sps_reordered", "sps_latency", "smallest_block", "larger_blocks", "smallest_transform",
    "larger_transforms", "depth_inter", "depth_intra", "reference_sets",
    "pps_id", "pps_sps_id", "references_0", "references_1", "initial_qp", "cb_offset", "cr_offset", "parallel_merge",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("bits", ["0" * 32 + "1" + "0" * 32, "0" * 64 + "1" + "1" * 64, "0" * 700])
def test_numbers_without_an_end_are_refused(name, bits):
    """None of 32 zeros or more is a number."""
    with pytest.raises(CodecError):
        check_parameter_sets(sets_with({name: bits}))


def test_numbers_are_read_as_the_standard_says():
    for value in (*range(70), 255, 2**16, 2**32 - 2):
        assert FieldReader(int(ue(value).ljust(72, "1"), 2).to_bytes(9, "big")).unsigned("it", 0, 2**32) == value
    for value in (*range(-40, 41), 2**31 - 1, -(2**31) + 1):
        assert FieldReader(int(se(value).ljust(72, "1"), 2).to_bytes(9, "big")).signed("it", -(2**31), 2**31) == value


def test_other_units_or_another_order_are_refused():
    vps, sps, pps = units = units_of(x265_sets())
    wider = units_of(x265_sets(width=4096))
    for others in (
        [],
        [sps, pps],
        [vps, pps, sps],
        [vps, sps],
        [vps, sps, sps, pps],
        [vps, sps, wider[1], pps],
        [*units, wider[1]],
        [*units, pps],
        [*units, *wider],
        [b"\x46\x01\x50", *units],  # access unit delimiter
        [*units, b"\x4e\x01\x05\x01\x00\x80"],  # SEI
        [vps, sps, pps, b""],
    ):
        with pytest.raises(CodecError):
            check_parameter_sets(to_annexb(others))


@pytest.mark.parametrize("unit", range(3))
@pytest.mark.parametrize("header_bit", range(16))
def test_every_bit_of_a_units_header_counts(unit, header_bit):
    units = units_of(x265_sets())
    header = int.from_bytes(units[unit][:2], "big") ^ 1 << header_bit
    units[unit] = header.to_bytes(2, "big") + units[unit][2:]
    with pytest.raises(CodecError):
        check_parameter_sets(to_annexb(units))


@pytest.mark.parametrize("unit", range(3))
@pytest.mark.parametrize("tail", [b"\x80", b"\x01", b"\x80\x80", b"\x00\x00\x03\x80", b"\xff" * 50, b"\x00\x00\x03"])
def test_bytes_behind_the_trailing_bits_are_refused(unit, tail):
    units = units_of(x265_sets())
    units[unit] += tail
    with pytest.raises(CodecError):
        check_parameter_sets(to_annexb(units))


def test_there_is_one_way_to_write_sets():
    units = units_of(x265_sets())
    sets = to_annexb(units)
    check_parameter_sets(sets)
    for other in (
        b"\0" + sets,
        sets + b"\0",
        b"".join(b"\0\0\1" + unit for unit in units),
        sets.replace(START, b"\0" + START),
        sets.replace(b"\0\0\3\0\x90", b"\0\0\3\0\0\3\x90"),  # prevention where there is nothing to prevent
        sets.replace(b"\x40\x01\x0c", b"\x40\x01\0\0\3\x0c"),
        sets.replace(b"\0\0\3\0\x90", b"\0\0\0\x90"),
        sets.replace(b"\0\0\3\0\x90", b"\0\0\2\x90"),
    ):
        assert other != sets
        with pytest.raises(CodecError):
            check_parameter_sets(other)


def test_sets_are_refused_wherever_they_are_cut():
    for sets in (written(192, 192), sets_with(NVENC_CHANGES)):
        for size in range(len(sets)):
            with pytest.raises(CodecError):
                check_parameter_sets(sets[:size])
        for begin in range(1, len(sets)):
            with pytest.raises(CodecError):
                check_parameter_sets(sets[begin:])


def test_large_sets_are_not_even_looked_at():
    with pytest.raises(CodecError, match="sets of 513 bytes"):
        check_parameter_sets(bytes(MAX_BYTES + 1))


MAY_CHANGE_BY_A_BIT = {
    "vps_ordering", "vps_buffered", "vps_latency",
    "width", "height", "counter", "sps_ordering", "sps_buffered", "sps_latency",
    "depth_inter", "depth_intra", "smallest_block", "larger_blocks", "larger_transforms",
    "asymmetric", "sao", "temporal_prediction", "strong_smoothing",
    "video_signal", "timing",
    "sign_hiding", "cabac_init", "constrained_intra", "transform_skip", "weighted", "across_slices",
    "lists_modification",
}  # fmt: skip
"""Fields of which some bit may be another: sizes and counts within bounds, tools, and what only players look at."""


@pytest.mark.parametrize("uniform_blocks", [False, True])
@pytest.mark.parametrize(("width", "height"), [(192, 192), (256, 192)])
def test_any_flipped_bit_is_refused_or_leaves_sets_that_decode(uniform_blocks, width, height):
    encoded = SoftwareEncoder(uniform_blocks=uniform_blocks).encode(noise(1, width, height, 4.0))
    sets = encoded.parameter_sets
    decoder = SoftwareDecoder()
    changed = set()
    for bit in range(8 * len(sets)):
        damaged = bytearray(sets)
        damaged[bit // 8] ^= 0x80 >> bit % 8
        try:
            stated = check_parameter_sets(bytes(damaged))
        except CodecError:
            continue
        with contextlib.suppress(CodecError):
            canvases = decoder.decode(bytes(damaged), encoded.pictures)
            assert canvases.shape == (1, stated.height * 3 // 2, stated.width)
        changed.add(bit)
    fields = field_of_each_bit(sets, uniform_blocks)
    assert {fields[bit] for bit in changed} <= MAY_CHANGE_BY_A_BIT
    # Most bits have to be as they are.
    assert len(changed) < 8 * len(sets) // 5


def field_of_each_bit(sets, uniform_blocks):
    """Position in sets of x265 -> the field that lies there, through start codes, headers and emulation prevention."""
    fields = x265_sets(*check_parameter_sets(sets)[:2])
    if uniform_blocks:
        fields |= {"smallest_block": ue(2), "larger_blocks": ue(0), "depth_intra": ue(0)}
    assert to_annexb(units_of(fields)) == sets
    names = list(fields)
    parts = [names[: names.index("sps")], names[names.index("sps") : names.index("pps")], names[names.index("pps") :]]
    found, start = {}, 0
    for unit, part in zip(nal_units(sets), parts, strict=True):
        start += len(START) + 2
        order = [name for name in part for _ in fields[name]]
        zeros = 0
        for at, byte in enumerate(unit[2:], start):
            if zeros >= 2 and byte == 3:
                zeros = 0
                continue
            zeros = zeros + 1 if byte == 0 else 0
            for bit in range(8):
                found[8 * at + bit] = order.pop(0) if order else "trailing bits"
        start += len(unit) - 2
    return {bit: found.get(bit, "between fields") for bit in range(8 * len(sets))}


@pytest.mark.parametrize(
    ("pix_fmt", "width", "reason"),
    [
        ("yuv444p", 192, "profile"),
        ("yuv420p10le", 192, "profile"),
        ("gray", 192, "profile"),
        ("yuv420p", 190, "conformance_window"),
        ("yuv420p", 192, "transquant_bypass"),
    ],
)
def test_parameter_sets_of_other_pictures_are_refused(pix_fmt, width, reason):
    """Other chroma, more bits, a width that takes a conformance window, and pictures that are not lossless."""
    context = av.VideoCodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt = width, 192, pix_fmt
    context.time_base = fractions.Fraction(1, 25)
    context.options = {"x265-params": "log-level=none:annexb=1:repeat-headers=1:no-info=1:no-wpp=1:bframes=0"}
    frame = av.VideoFrame(width, 192, pix_fmt)
    stream = b"".join(map(bytes, [*context.encode(frame), *context.encode(None)]))
    with pytest.raises(CodecError, match=reason):
        check_parameter_sets(to_annexb(nal_units(stream)[:3]))


@given(st.binary(max_size=60), st.integers(0, 2))
def test_no_bytes_are_more_than_a_codec_error(tail, unit):
    units = units_of(x265_sets())
    units[unit] = units[unit][: len(units[unit]) - len(tail) // 2] + tail
    for sets in (tail, START + tail, to_annexb(units)):
        with contextlib.suppress(CodecError):
            check_parameter_sets(sets)


@given(st.lists(st.tuples(st.sampled_from([name for name, bits in x265_sets().items() if bits]), st.text("01"))))
def test_no_fields_are_more_than_a_codec_error(changes):
    with contextlib.suppress(CodecError):
        check_parameter_sets(sets_with(dict(changes)))
