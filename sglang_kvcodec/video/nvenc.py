"""Pictures encoded by NVIDIA's video engines, through PyNvVideoCodec 2.2: lossless HEVC, every picture an IDR.

A100, H100, H200 and B200 have no such engine. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.base import Canvases, EncodedPictures
from sglang_kvcodec.video.bitstream import split_access_unit
from sglang_kvcodec.video.software import SoftwareDecoder

_OPTIONS = {
    "codec": "hevc",
    "preset": "P1",
    "tuning_info": "lossless",
    # Presets from P3 on would use B frames even for lossless (nvEncodeAPI.h).
    "bf": 0,
    "gop": 1,
    "idrperiod": 1,
    "repeatspspps": 1,
}
PICTURES_PER_SESSION = 4096
"""Bounds what a session may go wrong by; opening one costs some tens of milliseconds."""


class NvencEncoder:
    """A ``PictureEncoder`` of one device. The first picture of each size is decoded again in software and compared."""

    name = "nvenc"

    def __init__(self, library: Any, device: int) -> None:
        """Opens nothing yet: that takes the size of the first canvases.

        Args:
            library: the module PyNvVideoCodec.
            device: ordinal of the CUDA device.
        """
        self._library = library
        self._device = device
        self._verified: dict[tuple[int, int], bytes] = {}
        """Size of the canvases -> the parameter sets that were found to be good for it."""

    def encode(self, canvases: Canvases) -> EncodedPictures:
        """See ``PictureEncoder.encode``."""
        shape = (canvases.shape[1], canvases.shape[2])
        units: list[bytes] = []
        try:
            for start in range(0, len(canvases), PICTURES_PER_SESSION):
                units += self._session(canvases[start : start + PICTURES_PER_SESSION])
        except CodecError:
            raise
        except Exception as error:
            # Its exceptions have no base of their own.
            raise CodecError(f"NVENC failed: {error}") from error
        parts = [split_access_unit(unit) for unit in units]
        parameter_sets = {sets for sets, _ in parts}
        if len(parts) != len(canvases) or len(parameter_sets) != 1:
            raise CodecError(f"NVENC gave {len(parts)} pictures for {len(canvases)}, of {len(parameter_sets)} kinds")
        encoded = EncodedPictures(parameter_sets.pop(), tuple(picture for _, picture in parts))
        if self._verified.get(shape) != encoded.parameter_sets:
            self._verify(encoded, canvases)
            self._verified[shape] = encoded.parameter_sets
        return encoded

    def close(self) -> None:
        """See ``PictureEncoder.close``: no session outlives a call."""

    def _session(self, canvases: Canvases) -> Sequence[bytes]:
        """Access units of canvases, through a session of their own: it gives pictures late, and the last when flushed.

        Whether a session that was flushed takes more pictures is not documented.
        """
        rows, width = canvases.shape[1:]
        encoder = self._library.CreateEncoder(
            width, rows * 2 // 3, "NV12", True, gpu_id=self._device, cudacontext=0, **_OPTIONS
        )
        kinds = self._library.NV_ENC_PIC_FLAGS
        flags = int(kinds.FORCEIDR.value) | int(kinds.OUTPUT_SPSPPS.value)
        units = [unit for canvas in canvases for unit in encoder.Encode(np.ascontiguousarray(canvas).ravel(), flags)]
        units += encoder.EndEncode()
        return [bytes(unit["data"]) for unit in units]

    def _verify(self, encoded: EncodedPictures, canvases: Canvases) -> None:
        decoded = SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures[:1])
        if not np.array_equal(decoded, canvases[:1]):
            raise CodecError("what NVENC encodes does not decode to the same samples: it is not lossless here")


class NvencEncoders:
    """An ``EncoderSource`` of one device."""

    name = "nvenc"

    def __init__(self, library: Any, device: int) -> None:
        self._library = library
        self._device = device

    def encoder(self, *, uniform_blocks: bool = False) -> NvencEncoder:
        """See ``EncoderSource.encoder``; an engine chooses its blocks itself."""
        return NvencEncoder(self._library, self._device)

    def close(self) -> None:
        """Nothing is shared."""
