"""The NVENC backend against a rehearsal of PyNvVideoCodec; nothing here needs or proves anything of a GPU."""

import numpy as np
import pytest

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.testing.picture_codec import PictureCodecContract, noise
from sglang_kvcodec.testing.rehearsal import RehearsalLibrary
from sglang_kvcodec.video import nvenc
from sglang_kvcodec.video.nvenc import NvencEncoder, NvencEncoders
from sglang_kvcodec.video.software import SoftwareDecoder


class TestNvenc(PictureCodecContract):
    def open_encoder(self):
        return NvencEncoder(RehearsalLibrary(), 0)

    def open_decoder(self):
        return SoftwareDecoder()


@pytest.mark.parametrize("session", [1, 2, 5, 7])
def test_pictures_that_come_late_all_come(monkeypatch, session):
    monkeypatch.setattr(nvenc, "PICTURES_PER_SESSION", session)
    canvases = noise(7, 192, 192, 4.0)
    encoded = NvencEncoders(RehearsalLibrary(), 0).encoder().encode(canvases)
    np.testing.assert_array_equal(SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures), canvases)


def test_an_encoder_that_is_not_lossless_is_found_out_at_each_new_size():
    library = RehearsalLibrary()
    encoder = NvencEncoder(library, 0)
    encoder.encode(noise(1, 192, 192, 3.0))
    library.encodes_wrongly = True
    with pytest.raises(CodecError, match="not lossless"):
        encoder.encode(noise(1, 256, 192, 3.0))
    with pytest.raises(CodecError, match="not lossless"):
        encoder.encode(noise(1, 256, 192, 3.0))


def test_a_device_without_an_engine_is_a_codec_error():
    with pytest.raises(CodecError, match="NVENC failed: Codec not supported"):
        NvencEncoder(RehearsalLibrary(has_encoder=False), 0).encode(noise(1, 192, 192, 3.0))
