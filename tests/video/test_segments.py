"""What of a segment may reach a decoder: one slice of each picture, and nothing that hides among them."""

import numpy as np
import pytest
from hevc_kit import NVENC_CHANGES, se, sets_with, u, ue, units_of, x265_sets
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.testing.picture_codec import noise
from sglang_kvcodec.video.bitstream import NAL_IDR_N_LP, NAL_IDR_W_RADL, nal_header, to_annexb
from sglang_kvcodec.video.parameter_sets import check_parameter_sets
from sglang_kvcodec.video.segments import checked_segment, count_start_codes
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder

START = b"\0\0\0\1"


@pytest.fixture(scope="module")
def encoded():
    return SoftwareEncoder().encode(noise(3, 192, 192, 4.0))


def test_a_segment_is_what_was_given_joined(encoded):
    stated, segment = checked_segment(encoded.parameter_sets, encoded.pictures)
    assert stated == check_parameter_sets(encoded.parameter_sets)
    assert segment.tobytes() == encoded.parameter_sets + b"".join(encoded.pictures)


@pytest.mark.parametrize("uniform_blocks", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0, 300.0])
def test_what_x265_writes_passes(uniform_blocks, spread):
    encoder = SoftwareEncoder(uniform_blocks=uniform_blocks)
    for width, height in ((192, 192), (512, 256), (1024, 1024)):
        encoded = encoder.encode(noise(2, width, height, spread))
        checked_segment(encoded.parameter_sets, encoded.pictures * 5)


def test_a_segment_without_pictures_is_refused(encoded):
    with pytest.raises(CodecError, match="without pictures"):
        checked_segment(encoded.parameter_sets, [])


def test_a_picture_begins_with_an_idr_slice(encoded):
    good = encoded.pictures[0]
    for other in (b"", b"\0\0\0\1", good[1:], b"\0" + good, encoded.parameter_sets + good, START + b"\x02" + good[5:]):
        with pytest.raises(CodecError, match="IDR"):
            checked_segment(encoded.parameter_sets, [good, other])


SMUGGLED = [
    *units_of(x265_sets(width=4096)),
    b"\x26\x01\xac",  # another picture
    b"\x28\x01\x2c",  # another slice of this one
    b"\x02\x01\xd0",  # a predicted picture
    b"\x46\x01\x50",  # access unit delimiter
    b"\x48\x01",  # end of sequence
    b"\x4e\x01\x05\x01\x00\x80",  # SEI
    b"\x7e\x01\xff",  # of a kind that nobody knows
    b"\xff\xff",
    b"",
]


@pytest.mark.parametrize("unit", SMUGGLED, ids=lambda unit: unit[:2].hex())
@pytest.mark.parametrize("start_code", [b"\0\0\1", START, b"\0\0" + START])
def test_units_among_the_pictures_are_refused(encoded, unit, start_code):
    first, *others = encoded.pictures
    middle = len(first) // 2
    for picture in (
        first + start_code + unit,
        first[:middle] + start_code + unit + first[middle:],
        first[: middle + 1] + start_code + unit + first[middle + 1 :],
    ):
        for pictures in ([picture], [picture, *others], [*others, picture]):
            with pytest.raises(CodecError, match="NAL units"):
                checked_segment(encoded.parameter_sets, pictures)


def test_two_pictures_do_not_make_a_start_code_where_they_meet(encoded):
    """The zeros of one and the first byte of the next: that has to be a zero."""
    first, second = encoded.pictures[:2]
    with pytest.raises(CodecError, match="start code"):
        checked_segment(encoded.parameter_sets, [first + b"\0\0", second[3:]])
    checked_segment(encoded.parameter_sets, [first + b"\0\0", second])


def slice_header(**changes):
    """The first slice of an IDR picture under the sets of x265, field by field, and bytes that are no start code."""
    fields = {
        "nal": nal_header(NAL_IDR_N_LP),
        "first": u(1, 1),
        "drops_others": u(1, 0),
        "pps_id": ue(0),
        "type": ue(2),
        "sao": "",
        "qp_delta": se(-22),
        "across": "",
        "align": "1",
    } | changes
    bits = "".join(value for name, value in fields.items() if name != "nal")
    bits += "0" * (-len(bits) % 8)
    return START + fields["nal"] + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\x55" * 20


def test_slice_headers_written_field_by_field_are_those_of_x265(encoded):
    assert encoded.pictures[0].startswith(slice_header()[:9])


@pytest.mark.parametrize("qp", [0, 4, 26, 51])
@pytest.mark.parametrize("kind", [NAL_IDR_W_RADL, NAL_IDR_N_LP])
def test_slice_headers_of_either_kind_pass(qp, kind):
    checked_segment(sets_with({}), [slice_header(nal=nal_header(kind), qp_delta=se(qp - 26))])
    checked_segment(sets_with({"initial_qp": se(25)}), [slice_header(qp_delta=se(qp - 51))])


@pytest.mark.parametrize(
    ("offsets", "has_deblocking", "across", "says_across"),
    [("00", False, 1, False), ("10", False, 1, True), ("01", False, 1, True), ("11", True, 0, False),
     ("00", True, 1, True)],
)  # fmt: skip
def test_slice_headers_have_what_the_sets_ask_for(offsets, has_deblocking, across, says_across):
    changes = {"sao": u(1, 1), "across_slices": u(1, across)}
    if has_deblocking:
        changes["no_deblocking"] = NVENC_CHANGES["no_deblocking"]
    for flag in "01" if says_across else [""]:
        checked_segment(sets_with(changes), [slice_header(sao=offsets, across=flag)])
    # One field more or less, and what should be the bit before alignment is not.
    with pytest.raises(CodecError, match="alignment"):
        checked_segment(sets_with(changes), [slice_header(sao=offsets, across="" if says_across else "0")])


def test_the_slice_header_of_nvenc_passes():
    """As far as one was found: of a lossy stream, with QP 32."""
    begin = START + bytes.fromhex("2601af19")
    header = slice_header(nal=nal_header(NAL_IDR_W_RADL), sao="11", qp_delta=se(6), across="1")
    assert header.startswith(begin)
    checked_segment(sets_with(NVENC_CHANGES), [header])


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("begin with an IDR", {"nal": nal_header(1)}),
        ("begin with an IDR", {"nal": nal_header(21)}),
        ("begin with an IDR", {"nal": b"\x28\x02"}),
        ("begin with an IDR", {"nal": b"\x28\x09"}),
        ("begin with an IDR", {"nal": b"\x29\x01"}),
        ("begin with an IDR", {"nal": b"\xa8\x01"}),
        ("first_slice", {"first": u(1, 0)}),
        ("no_output_of_prior", {"drops_others": u(1, 1)}),
        ("parameter_set_id", {"pps_id": ue(1)}),
        ("parameter_set_id", {"pps_id": ue(63)}),
        ("slice_type", {"type": ue(1)}),
        ("slice_type", {"type": ue(3)}),
        ("slice_qp_delta", {"qp_delta": se(26)}),
        ("slice_qp_delta", {"qp_delta": se(-27)}),
        ("ends early", {"qp_delta": "0" * 12 + "1" + "0" * 12}),
        ("ends early", {"qp_delta": "0" * 64}),
        ("alignment", {"align": "0"}),
        ("alignment", {"align": "11"}),
    ],
)
def test_other_slice_headers_are_refused(reason, changes):
    with pytest.raises(CodecError, match=reason):
        checked_segment(sets_with({}), [slice_header(**changes)])


def test_headers_that_end_early_are_refused(encoded):
    for size in range(9):
        with pytest.raises(CodecError):
            checked_segment(encoded.parameter_sets, [encoded.pictures[0][:size]])


@given(st.binary(max_size=40))
def test_no_bytes_are_more_than_a_codec_error(tail):
    sets = sets_with({})
    for picture in (tail, START + tail, START + b"\x28\x01" + tail):
        try:
            checked_segment(sets, [picture])
        except CodecError:
            continue
        assert picture.count(b"\0\0\1") == 1


@pytest.mark.parametrize("values", [[0, 1], [0, 0, 0, 1], [0, 0, 1, 2, 3], list(range(256)), [0], [1]])
def test_start_codes_are_counted_as_bytes_count_does(values):
    rng = np.random.default_rng(0)
    for size in (*range(12), 100, 16383, 16384, 16385, 16387, 50000, 131075):
        stream = rng.choice(np.array(values, np.uint8), size)
        assert count_start_codes(stream) == stream.tobytes().count(b"\0\0\1"), size


def test_a_start_code_is_found_wherever_it_is():
    for size in (40000, 40001):
        for place in (*range(5), *range(16380, 16390), *range(32764, 32772), *range(size - 6, size - 2)):
            stream = np.full(size, 0xFF, np.uint8)
            stream[place : place + 3] = 0, 0, 1
            assert count_start_codes(stream) == 1, place


def test_both_decoders_refuse_the_same(encoded):
    """The software decoder would take some of it; but a page that one of them takes both have to."""
    with pytest.raises(CodecError, match="NAL units"):
        SoftwareDecoder().decode(encoded.parameter_sets, [encoded.pictures[0] + START + b"\x4e\x01\x05\x01\x00\x80"])
    with pytest.raises(CodecError, match="start codes"):
        SoftwareDecoder().decode(b"\0" + encoded.parameter_sets, encoded.pictures)


def test_a_segment_of_units_alone_is_refused():
    with pytest.raises(CodecError):
        checked_segment(to_annexb([]), [slice_header()])
