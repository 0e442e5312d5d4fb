"""The NVDEC backend against a rehearsal of PyNvVideoCodec; nothing here needs or proves anything of a GPU."""

import numpy as np
import pytest

from sglang_kvcodec.errors import CodecError, ConfigurationError
from sglang_kvcodec.testing.picture_codec import PictureCodecContract, noise
from sglang_kvcodec.testing.rehearsal import (
    FREED,
    PyNvVCException,
    RehearsalDriver,
    RehearsalLibrary,
    addresses_to_canvases,
    cudaVideoCodec,
)
from sglang_kvcodec.video import nvdec
from sglang_kvcodec.video.nvdec import MAX_SIZES, NvdecDecoder, NvdecDecoders, reserved_bytes
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder


class TestNvdec(PictureCodecContract):
    def open_encoder(self):
        return SoftwareEncoder()

    def open_decoder(self):
        return NvdecDecoder(RehearsalLibrary(), RehearsalDriver())


class TestNvdecWithAPitch(PictureCodecContract):
    def open_encoder(self):
        return SoftwareEncoder()

    def open_decoder(self):
        return NvdecDecoder(RehearsalLibrary(pitch_padding=37), RehearsalDriver(3))


@pytest.fixture
def library():
    return RehearsalLibrary(engines=3, pitch_padding=64)


@pytest.fixture
def driver():
    return RehearsalDriver(1)


def decoder_of(library, driver):
    return NvdecDecoder(library, driver)


def seen(frames):
    return addresses_to_canvases(
        frames.luma_addresses, frames.chroma_addresses, frames.pitch_bytes, frames.width, frames.height
    )


def test_frames_are_the_planes_where_they_were_decoded(library, driver):
    canvases = noise(5, 256, 192, 4.0)
    encoded = SoftwareEncoder().encode(canvases)
    decoder = decoder_of(library, driver)
    frames = decoder.decode_frames(encoded.parameter_sets, encoded.pictures)
    np.testing.assert_array_equal(seen(frames), canvases)
    assert (frames.width, frames.height, frames.pitch_bytes, len(frames)) == (256, 192, 256 + 64, 5)
    assert (frames.device, frames.stream) == (1, decoder.stream)
    assert frames.luma_addresses.dtype == frames.chroma_addresses.dtype == np.int64


def test_frames_of_the_software_decoder_have_the_same_form():
    canvases = noise(3, 256, 192, 4.0)
    encoded = SoftwareEncoder().encode(canvases)
    decoder = SoftwareDecoder()
    frames = decoder.decode_frames(encoded.parameter_sets, encoded.pictures)
    np.testing.assert_array_equal(seen(frames), canvases)
    assert (frames.device, frames.stream, frames.pitch_bytes) == (None, 0, 256)


def test_frames_are_overwritten_by_the_next_call(library, driver):
    encoder, decoder = SoftwareEncoder(), decoder_of(library, driver)
    first, second = noise(3, 192, 192, 4.0, seed=1), noise(2, 192, 192, 4.0, seed=2)
    coded = [encoder.encode(canvases) for canvases in (first, second)]
    frames = decoder.decode_frames(coded[0].parameter_sets, coded[0].pictures)
    decoder.decode_frames(coded[1].parameter_sets, coded[1].pictures)
    np.testing.assert_array_equal(seen(frames), np.concatenate([second, first[2:]]))


def test_canvases_in_host_memory_outlive_the_next_call(library, driver):
    encoder, decoder = SoftwareEncoder(), decoder_of(library, driver)
    first = noise(3, 192, 192, 4.0, seed=1)
    coded = encoder.encode(first)
    kept = decoder.decode(coded.parameter_sets, coded.pictures)
    other = encoder.encode(noise(3, 192, 192, 4.0, seed=2))
    decoder.decode(other.parameter_sets, other.pictures)
    np.testing.assert_array_equal(kept, first)


def test_each_decoder_has_a_stream_of_its_own_and_one_decoder_of_each_size(library, driver):
    encoder = SoftwareEncoder()
    decoders = [decoder_of(library, driver) for _ in range(2)]
    for _ in range(2):
        for width, height in ((192, 192), (256, 192)):
            encoded = encoder.encode(noise(1, width, height, 3.0))
            for decoder in decoders:
                decoder.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.created) == 4
    assert {options["cudastream"] for options in library.created} == {decoder.stream for decoder in decoders}
    assert 0 not in driver.streams
    for options in library.created:
        assert (options["gpuid"], options["codec"], options["usedevicememory"]) == (1, cudaVideoCodec.HEVC, True)


def test_a_picture_of_another_size_inside_a_segment_never_passes_for_sound(library, driver, capsys):
    """The engine would scale it without a word: here the digest of the planes has to tell."""
    encoder, decoder = SoftwareEncoder(), decoder_of(library, driver)
    large, small = encoder.encode(noise(1, 256, 192, 3.0)), encoder.encode(noise(1, 192, 192, 3.0))
    canvases = decoder.decode(large.parameter_sets, [large.pictures[0], small.pictures[0]])
    assert canvases.shape == (2, 288, 256)
    with pytest.raises(CodecError, match="IDR"):
        decoder.decode(large.parameter_sets, [large.pictures[0], small.parameter_sets + small.pictures[0]])


def test_damage_is_only_printed(library, driver, capsys):
    canvases = noise(3, 192, 192, 4.0)
    encoded = SoftwareEncoder().encode(canvases)
    damaged = encoded.pictures[1][:9]  # a slice header, and nothing in the slice
    decoder = decoder_of(library, driver)
    decoded = decoder.decode(encoded.parameter_sets, [encoded.pictures[0], damaged, encoded.pictures[2]])
    assert "Decode Error occurred for picture 1" in capsys.readouterr().out
    np.testing.assert_array_equal(decoded[[0, 2]], canvases[[0, 2]])
    assert not np.array_equal(decoded[1], canvases[1])


@pytest.mark.parametrize("error", [PyNvVCException("999"), RuntimeError("HW reset"), MemoryError()])
def test_a_decoder_that_fails_is_replaced(library, driver, error):
    canvases = noise(2, 192, 192, 4.0)
    encoded = SoftwareEncoder().encode(canvases)
    decoder = decoder_of(library, driver)
    decoder.decode(encoded.parameter_sets, encoded.pictures)
    library.fail_next(error)
    with pytest.raises(CodecError, match="NVDEC failed"):
        decoder.decode(encoded.parameter_sets, encoded.pictures)
    np.testing.assert_array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases)
    assert len(library.created) == 2


def test_a_decoder_whose_planes_were_wrong_is_replaced_on_request(library, driver):
    encoded = SoftwareEncoder().encode(noise(2, 192, 192, 4.0))
    decoder = decoder_of(library, driver)
    frames = decoder.decode_frames(encoded.parameter_sets, encoded.pictures)
    decoder.replace()
    assert np.all(seen(frames) == FREED)
    decoder.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.created) == 2


def test_too_few_pictures_are_an_error_and_cost_the_decoder(library, driver, monkeypatch):
    encoded = SoftwareEncoder().encode(noise(3, 192, 192, 4.0))
    decoder = decoder_of(library, driver)
    decoder.decode(encoded.parameter_sets, encoded.pictures)
    core = next(iter(decoder._of_size.values()))
    monkeypatch.setattr(core, "Decode", lambda packet: type(core).Decode(core, packet)[:2])
    with pytest.raises(CodecError, match="2 pictures came out of 3"):
        decoder.decode(encoded.parameter_sets, encoded.pictures)
    decoder.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.created) == 2


def test_sizes_that_were_not_used_for_longest_are_given_up(library, driver):
    encoder, decoder = SoftwareEncoder(), decoder_of(library, driver)
    widths = [192 + 64 * index for index in range(MAX_SIZES + 1)]
    coded = [encoder.encode(noise(1, width, 192, 3.0)) for width in widths]
    for encoded in coded:
        decoder.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.freed) == 1
    decoder.decode(coded[-1].parameter_sets, coded[-1].pictures)
    assert len(library.created) == MAX_SIZES + 1
    decoder.decode(coded[0].parameter_sets, coded[0].pictures)
    assert len(library.created) == MAX_SIZES + 2


def test_a_size_that_no_engine_surely_takes_is_refused_before_it_is_asked(library, driver):
    encoded = SoftwareEncoder().encode(noise(1, 128, 128, 3.0))
    with pytest.raises(CodecError, match="128, not 144 to 8192"):
        decoder_of(library, driver).decode(encoded.parameter_sets, encoded.pictures)
    encoded = SoftwareEncoder().encode(noise(1, 144, 160, 3.0))
    with pytest.raises(CodecError, match="144x160"):
        decoder_of(library, driver).decode(encoded.parameter_sets, encoded.pictures)
    assert library.created == []


@pytest.mark.parametrize(("threads", "expected"), [(1, 6), (6, 6), (11, 11)])
def test_there_are_two_decoders_an_engine_at_least(library, driver, threads, expected):
    assert NvdecDecoders(library, driver, engines=3, threads=threads).threads == expected


def test_decoders_are_warm_before_the_first_segment(library, driver):
    source = NvdecDecoders(library, driver, engines=1, threads=2)
    source.prepare([(192, 192), (256, 192)], pictures=5)
    assert len(library.created) == 4
    assert source.used_bytes > 0
    encoded = SoftwareEncoder().encode(noise(5, 256, 192, 3.0))
    first, second, third = (source.decoder() for _ in range(3))
    assert len({decoder.stream for decoder in (first, second, third)}) == 3
    for decoder in (first, second):
        decoder.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.created) == 4
    third.decode(encoded.parameter_sets, encoded.pictures)
    assert len(library.created) == 5
    source.close()
    assert driver.streams == []


@pytest.mark.parametrize(
    ("most_mib", "beside_mib", "sizes", "expected"),
    # A stream takes 1 MiB of this driver; one size leaves room for a second.
    [(100, 0, 2, 6), (7, 1, 2, 3), (6, 1, 2, 3), (5, 1, 2, 2), (9, 1, 1, 3), (2, 1, 2, 1)],
)
def test_there_are_as_many_decoders_as_fit_into_the_memory_allowed(
    library, driver, most_mib, beside_mib, sizes, expected, caplog
):
    source = NvdecDecoders(library, driver, engines=3, threads=1)
    source.prepare([(192, 192), (256, 192)][:sizes], 3, most_bytes=most_mib << 20, bytes_beside=beside_mib << 20)
    assert source.threads == expected
    assert source.used_bytes + expected * (beside_mib << 20) <= most_mib << 20
    assert (f"{expected} NVDEC decoders instead of 6" in caplog.text) == (expected < 6)
    assert len({source.decoder().stream for _ in range(expected)}) == expected


def test_memory_that_does_not_hold_one_decoder_refuses_the_start(library, driver):
    with pytest.raises(ConfigurationError, match=r"1 MiB of GPU memory.* 3 MiB, of 3 MiB allowed"):
        NvdecDecoders(library, driver, engines=3, threads=1).prepare(
            [(192, 192)], 3, most_bytes=3 << 20, bytes_beside=3 << 20
        )


def test_decoders_that_give_other_samples_are_not_served_with(library, driver, monkeypatch):
    monkeypatch.setattr(driver, "copy_to_host", lambda target, *rest: target.fill(7))
    with pytest.raises(ConfigurationError, match="other samples"):
        NvdecDecoders(library, driver, engines=1, threads=1).prepare([(192, 192)], pictures=3)


def test_a_decoder_that_can_not_be_made_refuses_the_start(library, driver):
    library.fail_next(PyNvVCException("no session"))
    with pytest.raises(ConfigurationError, match=r"does not decode.*no session"):
        NvdecDecoders(library, driver, engines=1, threads=1).prepare([(192, 192)], pictures=3)


def test_the_memory_to_reserve_is_below_a_gibibyte_for_a_hopper():
    # Seven engines, the pictures of a model of 8 heads of 128, 32 pages a call.
    used = reserved_bytes([(512, 256)], 32, 7 * nvdec.DECODERS_PER_ENGINE)
    assert 14 * 32 * 512 * 384 < used < 1 << 30
    assert reserved_bytes([(512, 256), (192, 192)], 32, 1) > reserved_bytes([(512, 256)], 32, 1)
