import re

import numpy as np
import pytest

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.testing.picture_codec import PictureCodecContract, noise
from sglang_kvcodec.video.bitstream import (
    LEVEL_6_2,
    NAL_PPS,
    NAL_SPS,
    NAL_VPS,
    nal_type,
    nal_units,
    split_access_unit,
    to_annexb,
    unescaped,
    with_level,
)
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder


class TestSoftware(PictureCodecContract):
    def open_encoder(self):
        return SoftwareEncoder()

    def open_decoder(self):
        return SoftwareDecoder()


class TestSoftwareUniformBlocks(PictureCodecContract):
    def open_encoder(self):
        return SoftwareEncoder(uniform_blocks=True)

    def open_decoder(self):
        return SoftwareDecoder()


@pytest.mark.parametrize(("uniform_blocks", "log2_smallest"), [(False, 4), (True, 5)])
def test_uniform_blocks_leave_no_smaller_coding_block(uniform_blocks, log2_smallest):
    encoder = SoftwareEncoder(uniform_blocks=uniform_blocks)
    bits = ParameterBits(nal_units(encoder.encode(noise(1, 256, 192, 5.0)).parameter_sets)[1], 1 + 12)
    assert [bits.exp_golomb() for _ in range(4)] == [0, 1, 256, 192]  # id, 4:2:0, width, height
    bits.take(1)
    depths_and_counter = [bits.exp_golomb() for _ in range(3)]
    assert depths_and_counter[:2] == [0, 0]
    bits.take(1)
    for _ in range(3):  # picture buffer
        bits.exp_golomb()
    smallest = 3 + bits.exp_golomb()
    assert (smallest, smallest + bits.exp_golomb()) == (log2_smallest, 5)


class ParameterBits:
    """Reads the fields of a parameter set (ITU-T H.265, 7.2 and 9.2), from ``skip`` bytes after the NAL unit header."""

    def __init__(self, unit: bytes, skip: int) -> None:
        self.bits = "".join(f"{byte:08b}" for byte in unescaped(unit)[2 + skip :])
        self.position = 0

    def take(self, count):
        self.position += count
        return self.bits[self.position - count : self.position]

    def exp_golomb(self):
        zeros = self.bits.index("1", self.position) - self.position
        return int(self.take(2 * zeros + 1), 2) - 1


def test_a_picture_is_one_idr_slice_and_nothing_else():
    encoded = SoftwareEncoder().encode(noise(3, 256, 192, 5.0))
    for picture in encoded.pictures:
        units = nal_units(picture)
        assert [nal_type(unit) for unit in units] in ([19], [20])
        assert units[0][2] & 0x80  # first_slice_segment_in_pic_flag


@pytest.mark.parametrize(("width", "height"), [(192, 192), (1024, 512), (8192, 192), (192, 8192)])
def test_parameter_sets_state_main_profile_and_level_6_2(width, height):
    sets = nal_units(SoftwareEncoder().encode(np.full((1, height * 3 // 2, width), 128, np.uint8)).parameter_sets)
    assert [nal_type(unit) for unit in sets] == [NAL_VPS, NAL_SPS, NAL_PPS]
    for unit, level_at in ((sets[0], 17), (sets[1], 14)):
        raw = unescaped(unit)
        assert raw[level_at] == LEVEL_6_2
        assert raw[level_at - 11] & 0x1F == 1  # general_profile_idc: Main


def test_pictures_use_what_a_hardware_decoder_takes():
    """No wavefronts (the decoder would need entry points): the PPS's entropy_coding_sync and tiles flags are off."""
    pps = ParameterBits(nal_units(SoftwareEncoder().encode(noise(1, 256, 192, 5.0)).parameter_sets)[2], 0)
    take, exp_golomb = pps.take, pps.exp_golomb
    exp_golomb(), exp_golomb()  # ids
    take(1 + 1 + 3 + 1 + 1)  # dependent slices, output flag, extra bits, sign hiding, cabac_init
    exp_golomb(), exp_golomb(), exp_golomb()  # references, init_qp
    take(2)  # constrained intra, transform skip
    if take(1) == "1":
        exp_golomb()
    exp_golomb(), exp_golomb()  # chroma offsets
    take(3)  # slice chroma offsets, weighted prediction twice
    transquant_bypass, tiles, entropy_sync = take(1), take(1), take(1)
    assert (transquant_bypass, tiles, entropy_sync) == ("1", "0", "0")


def test_with_level_minds_emulation_prevention():
    # A VPS whose profile bytes are zeros, so that the level byte comes after inserted bytes.
    raw = bytes([NAL_VPS << 1, 1]) + bytes(15) + bytes([2]) + bytes([0, 0, 1, 0x80])
    escaped = re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\0\0\3", raw)
    assert len(escaped) > len(raw)
    patched = with_level(escaped, LEVEL_6_2)
    assert unescaped(patched) == raw[:17] + bytes([LEVEL_6_2]) + raw[18:]
    assert not re.search(rb"\x00\x00[\x00-\x02]", patched)


def test_nal_units_round_trip_with_either_start_code():
    units = [b"\x40\x01\x0c", b"\x42\x01\x01", b"\x44\x01\xc1", b"\x28\x01\xaf\x00\x00\x03\x01\x80"]
    assert nal_units(to_annexb(units)) == units
    assert nal_units(b"".join(b"\0\0\1" + unit for unit in units)) == units


@pytest.mark.parametrize(
    "kinds", [(32, 33, 34), (32, 33, 34, 39, 20), (32, 33, 34, 20, 20), (33, 34, 20), (32, 33, 34, 1), (20,)]
)
def test_an_access_unit_of_anything_else_is_refused(kinds):
    stream = to_annexb([bytes([kind << 1, 1]) + b"\x55" * 20 for kind in kinds])
    with pytest.raises(CodecError, match="NAL units"):
        split_access_unit(stream)


def test_an_access_unit_without_start_code_is_refused():
    with pytest.raises(CodecError, match="Annex B"):
        split_access_unit(b"garbage\0\0\0\1\x40\x01")


def test_a_closed_encoder_opens_again():
    encoder, canvases = SoftwareEncoder(), noise(1, 192, 192, 3.0)
    first = encoder.encode(canvases)
    encoder.close()
    encoder.close()
    assert encoder.encode(canvases) == first


def test_a_canvas_no_encoder_takes_is_a_codec_error():
    with pytest.raises(CodecError):
        SoftwareEncoder().encode(np.zeros((1, 3, 1), np.uint8))


def test_decoding_damaged_bytes_prints_nothing(capfd):
    encoded = SoftwareEncoder().encode(noise(1, 192, 192, 4.0))
    with pytest.raises(CodecError):
        SoftwareDecoder().decode(encoded.parameter_sets, [encoded.pictures[0][:8] + b"\xff" * 100])
    assert capfd.readouterr() == ("", "")
