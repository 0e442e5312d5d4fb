"""What every picture encoder and decoder must do: subclass, name the two, and the tests run against them."""

# ruff: noqa: D102 - the names of the tests say what they hold

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.base import Canvases, PictureDecoder, PictureEncoder

SIZES = ((192, 192), (256, 192), (192, 576), (1024, 256))
"""Width and height of pictures."""


def noise(count: int, width: int, height: int, spread: float, seed: int = 0) -> Canvases:
    """Canvases of Gaussian noise around 128, the full range of values included."""
    rng = np.random.default_rng(seed)
    values = rng.normal(128, spread, (count, height * 3 // 2, width)).round().clip(0, 255).astype(np.uint8)
    values.reshape(count, -1)[:, :256] = np.arange(256)
    return values


class PictureCodecContract:
    """Subclass as ``TestX`` and implement the two openers."""

    def open_encoder(self) -> PictureEncoder:
        """A new encoder."""
        raise NotImplementedError

    def open_decoder(self) -> PictureDecoder:
        """A new decoder."""
        raise NotImplementedError

    @pytest.mark.parametrize(("width", "height"), SIZES)
    @pytest.mark.parametrize("spread", [0.0, 2.0, 300.0])
    def test_round_trip_is_lossless(self, width: int, height: int, spread: float) -> None:
        canvases = noise(3, width, height, spread)
        encoded = self.open_encoder().encode(canvases)
        decoded = self.open_decoder().decode(encoded.parameter_sets, encoded.pictures)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, canvases)

    def test_every_picture_decodes_alone_and_in_any_order(self) -> None:
        canvases = noise(5, 256, 192, 4.0)
        encoded = self.open_encoder().encode(canvases)
        decoder = self.open_decoder()
        for picture, canvas in zip(encoded.pictures, canvases, strict=True):
            np.testing.assert_array_equal(decoder.decode(encoded.parameter_sets, [picture])[0], canvas)
        order = [3, 0, 0, 4, 1]
        decoded = decoder.decode(encoded.parameter_sets, [encoded.pictures[index] for index in order])
        np.testing.assert_array_equal(decoded, canvases[order])

    def test_pictures_of_several_encoders_share_a_segment(self) -> None:
        canvases = noise(4, 256, 192, 4.0)
        first, second = self.open_encoder(), self.open_encoder()
        halves = [first.encode(canvases[:1]), second.encode(canvases[1:3]), first.encode(canvases[3:])]
        assert len({half.parameter_sets for half in halves}) == 1
        pictures = [picture for half in halves for picture in half.pictures]
        np.testing.assert_array_equal(self.open_decoder().decode(halves[0].parameter_sets, pictures), canvases)

    def test_an_encoder_takes_another_size(self) -> None:
        encoder, decoder = self.open_encoder(), self.open_decoder()
        for width, height in (*SIZES, *SIZES):
            canvases = noise(1, width, height, 3.0)
            encoded = encoder.encode(canvases)
            np.testing.assert_array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases)

    def test_encoding_is_deterministic(self) -> None:
        canvases = noise(2, 256, 192, 4.0)
        assert self.open_encoder().encode(canvases) == self.open_encoder().encode(canvases)
        repeated = self.open_encoder().encode(np.repeat(canvases[:1], 40, axis=0))
        assert len(set(repeated.pictures)) == 1

    def test_damaged_pictures_never_pass_for_sound(self) -> None:
        canvases = noise(2, 192, 192, 4.0)
        encoded = self.open_encoder().encode(canvases)
        decoder, rng = self.open_decoder(), np.random.default_rng(1)
        for _ in range(60):
            damaged = bytearray(encoded.pictures[0])
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
            assert_refused_or_shaped(decoder, encoded.parameter_sets, [bytes(damaged), encoded.pictures[1]], canvases)
        np.testing.assert_array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases)

    def test_truncated_pictures_never_pass_for_sound(self) -> None:
        canvases = noise(1, 192, 192, 4.0)
        encoded = self.open_encoder().encode(canvases)
        decoder, picture = self.open_decoder(), encoded.pictures[0]
        for size in (0, 1, 4, 5, 6, 7, 20, len(picture) // 2, len(picture) - 2):
            assert_refused_or_shaped(decoder, encoded.parameter_sets, [picture[:size]], canvases)

    def test_damaged_parameter_sets_never_pass_for_sound(self) -> None:
        canvases = noise(1, 192, 192, 4.0)
        encoded = self.open_encoder().encode(canvases)
        decoder, sets = self.open_decoder(), encoded.parameter_sets
        for bit in range(0, len(sets) * 8, 3):
            damaged = bytearray(sets)
            damaged[bit // 8] ^= 1 << bit % 8
            assert_refused_or_shaped(decoder, bytes(damaged), encoded.pictures, canvases)
        for size in range(0, len(sets), 7):
            assert_refused_or_shaped(decoder, sets[:size], encoded.pictures, canvases)

    @pytest.mark.parametrize("garbage", [b"", b"\0", b"\0\0\0\1", b"no video at all" * 20, bytes(1000), b"\xff" * 1000])
    def test_garbage_is_refused(self, garbage: bytes) -> None:
        sets = self.open_encoder().encode(noise(1, 192, 192, 4.0)).parameter_sets
        decoder = self.open_decoder()
        for parameter_sets in (b"", garbage, sets):
            with pytest.raises(CodecError):
                decoder.decode(parameter_sets, [garbage])

    def test_a_segment_of_two_sizes_or_of_none_is_refused(self) -> None:
        encoder, decoder = self.open_encoder(), self.open_decoder()
        small, large = encoder.encode(noise(1, 192, 192, 2.0)), encoder.encode(noise(1, 256, 192, 2.0))
        with pytest.raises(CodecError):
            decoder.decode(small.parameter_sets, [*small.pictures, large.parameter_sets + large.pictures[0]])
        with pytest.raises(CodecError):
            decoder.decode(small.parameter_sets, [])

    def test_other_threads_run_during_the_work(self) -> None:
        canvases = noise(2, 1024, 1024, 30.0)
        encoder, decoder = self.open_encoder(), self.open_decoder()
        encoded = encoder.encode(canvases)
        assert runs_beside(lambda: encoder.encode(canvases))
        assert runs_beside(lambda: decoder.decode(encoded.parameter_sets, encoded.pictures))

    def test_threads_with_objects_of_their_own_do_not_disturb_each_other(self) -> None:
        def round_trips(seed: int) -> bool:
            encoder, decoder = self.open_encoder(), self.open_decoder()
            for number in range(4):
                canvases = noise(2, 256, 192, 4.0, 10 * seed + number)
                encoded = encoder.encode(canvases)
                if not np.array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases):
                    return False
            encoder.close()
            decoder.close()
            return True

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(round_trips, range(8)))


def runs_beside(work: Callable[[], object]) -> bool:
    """Whether this thread gets Python's lock before ``work`` ends on another one that is never asked to give it up."""
    started, done = threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        work()
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        beside = not done.is_set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    return beside


def assert_refused_or_shaped(
    decoder: PictureDecoder, parameter_sets: bytes, pictures: list[bytes] | tuple[bytes, ...], sound: Canvases
) -> npt.NDArray[np.uint8] | None:
    """A damaged segment: ``CodecError``, or canvases for as many pictures, which the plane digest then judges."""
    try:
        decoded = decoder.decode(parameter_sets, pictures)
    except CodecError:
        return None
    assert decoded.dtype == np.uint8
    assert len(decoded) == len(sound)
    return decoded
