"""The same contract on the engines of a real GPU; scripts/test-gpu runs it."""

import numpy as np
import pytest

from sglang_kvcodec.testing.picture_codec import PictureCodecContract, noise
from sglang_kvcodec.video import open_decoders
from sglang_kvcodec.video.cuda_driver import CudaDriver
from sglang_kvcodec.video.nvdec import NvdecDecoder
from sglang_kvcodec.video.nvidia import load_library, probe_nvidia
from sglang_kvcodec.video.software import SoftwareEncoder

pytestmark = pytest.mark.nvdec


class TestNvdecOnGpu(PictureCodecContract):
    def open_encoder(self):
        return SoftwareEncoder()

    def open_decoder(self):
        assert probe_nvidia(0).decode_problem == ""
        return NvdecDecoder(load_library(), CudaDriver(0))


def test_a_warm_pool_decodes_what_a_server_will():
    source = open_decoders("nvdec", threads=2, device=0)
    source.prepare([(256, 192), (512, 256)], 32, most_bytes=1 << 30, bytes_beside=40 << 20)
    assert 0 < source.used_bytes + source.threads * (40 << 20) <= 1 << 30
    canvases = noise(32, 512, 256, 3.0)
    encoded = SoftwareEncoder().encode(canvases)
    decoders = [source.decoder() for _ in range(source.threads)]
    for decoder in decoders:
        np.testing.assert_array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases)
    source.close()
