"""Parameter sets and slices written field by field, to change what no encoder can be asked to."""

from __future__ import annotations

from sglang_kvcodec.video.bitstream import NAL_PPS, NAL_SPS, NAL_VPS, escaped, nal_header, to_annexb

Fields = dict[str, str]
"""Names of fields, in their order, with their bits as text; what is added by a condition goes with the condition."""


def u(count: int, value: int) -> str:
    """A number of so many bits."""
    return f"{value:0{count}b}"


def ue(value: int) -> str:
    """An unsigned Exp-Golomb number."""
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def se(value: int) -> str:
    """A signed one."""
    return ue(2 * value - 1 if value > 0 else -2 * value)


def profile(prefix: str) -> Fields:
    """profile_tier_level of Main at level 6.2."""
    return {
        f"{prefix}space_tier_profile": u(8, 1),
        f"{prefix}compatible": u(32, 0x60000000),
        f"{prefix}source": u(4, 0b1001),
        f"{prefix}constraints": u(44, 0),
        f"{prefix}level": u(8, 186),
    }


def x265_sets(width: int = 192, height: int = 192) -> Fields:
    """What x265 writes for ``SoftwareEncoder``; "sps" and "pps" mark where the next parameter set begins."""
    return {
        "vps_id": u(4, 0),
        "base_layer": u(2, 3),
        "layers": u(6, 0),
        "vps_sub_layers": u(3, 0),
        "vps_nesting": u(1, 1),
        "vps_reserved": u(16, 0xFFFF),
        **profile("vps_"),
        "vps_ordering": u(1, 1),
        "vps_buffered": ue(2),
        "vps_reordered": ue(0),
        "vps_latency": ue(1),
        "max_layer_id": u(6, 0),
        "layer_sets": ue(0),
        "vps_timing": u(1, 0),
        "vps_extension": u(1, 0),
        "sps": "",
        "sps_vps_id": u(4, 0),
        "sps_sub_layers": u(3, 0),
        "sps_nesting": u(1, 1),
        **profile("sps_"),
        "sps_id": ue(0),
        "chroma": ue(1),
        "width": ue(width),
        "height": ue(height),
        "cropping": u(1, 0),
        "luma_bits": ue(0),
        "chroma_bits": ue(0),
        "counter": ue(4),
        "sps_ordering": u(1, 1),
        "sps_buffered": ue(2),
        "sps_reordered": ue(0),
        "sps_latency": ue(1),
        "smallest_block": ue(1),
        "larger_blocks": ue(1),
        "smallest_transform": ue(0),
        "larger_transforms": ue(3),
        "depth_inter": ue(0),
        "depth_intra": ue(1),
        "sps_scaling_lists": u(1, 0),
        "asymmetric": u(1, 0),
        "sao": u(1, 0),
        "pcm": u(1, 0),
        "reference_sets": ue(0),
        "long_term": u(1, 0),
        "temporal_prediction": u(1, 1),
        "strong_smoothing": u(1, 1),
        "vui": u(1, 1),
        "aspect_ratio": u(1, 0),
        "overscan": u(1, 0),
        "video_signal": u(1, 1) + u(3, 5) + u(2, 0),
        "chroma_location": u(1, 0),
        "neutral_fields": u(3, 0),
        "display_window": u(1, 0),
        "timing": u(1, 1) + u(32, 1) + u(32, 25) + u(1, 0),
        "hrd": u(1, 0),
        "restrictions": u(1, 0),
        "sps_extension": u(1, 0),
        "pps": "",
        "pps_id": ue(0),
        "pps_sps_id": ue(0),
        "dependent_slices": u(1, 0),
        "output_flag": u(1, 0),
        "extra_bits": u(3, 0),
        "sign_hiding": u(1, 0),
        "cabac_init": u(1, 0),
        "references_0": ue(0),
        "references_1": ue(0),
        "initial_qp": se(0),
        "constrained_intra": u(1, 0),
        "transform_skip": u(1, 0),
        "qp_delta": u(1, 0),
        "cb_offset": se(0),
        "cr_offset": se(0),
        "slice_chroma_offsets": u(1, 0),
        "weighted": u(2, 0),
        "transquant_bypass": u(1, 1),
        "tiles": u(1, 0),
        "wavefronts": u(1, 0),
        "across_slices": u(1, 1),
        "deblocking_control": u(1, 1),
        "deblocking_override": u(1, 0),
        "no_deblocking": u(1, 1),
        "pps_scaling_lists": u(1, 0),
        "lists_modification": u(1, 0),
        "parallel_merge": ue(0),
        "slice_extension": u(1, 0),
        "pps_extension": u(1, 0),
    }


NVENC_CHANGES: Fields = {
    "vps_buffered": ue(4),
    "vps_latency": ue(0),
    "sps_buffered": ue(4),
    "sps_reordered": ue(0),
    "sps_latency": ue(0),
    "depth_inter": ue(3),
    "depth_intra": ue(3),
    "asymmetric": u(1, 1),
    "sao": u(1, 1),
    "reference_sets": ue(1) + ue(4) + ue(0) + 4 * (ue(0) + u(1, 0)),
    "temporal_prediction": u(1, 0),
    "strong_smoothing": u(1, 0),
    "aspect_ratio": u(1, 1) + u(8, 1),
    "video_signal": u(1, 1) + u(3, 5) + u(1, 0) + u(1, 1) + u(24, 0x010101),
    "timing": u(1, 1) + u(32, 1) + u(32, 60) + u(1, 0),
    "cabac_init": u(1, 1),
    "transform_skip": u(1, 1),
    "qp_delta": u(1, 1) + ue(0),
    "no_deblocking": u(1, 0) + se(0) + se(0),
}
"""What NVENC writes otherwise than x265, seen in lossy streams of it. Those of a fixed bit rate also have an HRD."""


def nal(kind: int, bits: str) -> bytes:
    """A NAL unit of these fields and trailing bits."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    return nal_header(kind) + escaped(int(bits, 2).to_bytes(len(bits) // 8, "big"))


def units_of(fields: Fields) -> list[bytes]:
    """VPS, SPS and PPS."""
    names = list(fields)
    ends = [names.index("sps"), names.index("pps"), len(names)]
    parts = [names[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    kinds = (NAL_VPS, NAL_SPS, NAL_PPS)
    return [nal(kind, "".join(fields[name] for name in part)) for kind, part in zip(kinds, parts, strict=True)]


def sets_with(changes: Fields, **size: int) -> bytes:
    """The sets of x265 with some fields changed."""
    fields = x265_sets(**size)
    assert set(changes) <= set(fields)
    return to_annexb(units_of(fields | changes))
