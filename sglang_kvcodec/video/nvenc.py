"""Pictures encoded by NVIDIA's video engines, through PyNvVideoCodec 2.2: lossless HEVC, every picture an IDR.

A100, H100, H200 and B200 have no such engine. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.base import Canvases, DeviceCanvases, EncodedPictures
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
    """A ``DeviceEncoder`` of one device. The first picture of each size is decoded again in software and compared."""

    name = "nvenc"

    def __init__(self, library: Any, device: int) -> None:
        """Opens nothing yet: that takes the size of the first canvases.

        Args:
            library: the module PyNvVideoCodec.
            device: ordinal of the CUDA device.
        """
        self._library = library
        self._device = device
        self._verified: dict[tuple[int, int, bool], bytes] = {}
        """Size of the canvases, whether in host memory -> the parameter sets that were found to be good for it."""

    def encode(self, canvases: Canvases) -> EncodedPictures:
        """See ``PictureEncoder.encode``."""
        frames = [np.ascontiguousarray(canvas).ravel() for canvas in canvases]
        return self._encode(canvases.shape[1], canvases.shape[2], frames, True, lambda: canvases[0])

    def encode_device(self, canvases: DeviceCanvases) -> EncodedPictures:
        """See ``DeviceEncoder.encode_device``."""
        rows, width = canvases.rows, canvases.width
        starts = range(canvases.address, canvases.address + canvases.pictures * rows * width, rows * width)
        frames = [_DeviceFrame(start, rows, width) for start in starts]
        return self._encode(rows, width, frames, False, lambda: canvases.to_host(0))

    def _encode(
        self, rows: int, width: int, frames: Sequence[Any], is_on_host: bool, first: Callable[[], Canvases]
    ) -> EncodedPictures:
        units: list[bytes] = []
        try:
            for start in range(0, len(frames), PICTURES_PER_SESSION):
                units += self._session(rows, width, frames[start : start + PICTURES_PER_SESSION], is_on_host)
        except CodecError:
            raise
        except Exception as error:
            # Its exceptions have no base of their own.
            raise CodecError(f"NVENC failed: {error}") from error
        parts = [split_access_unit(unit) for unit in units]
        parameter_sets = {sets for sets, _ in parts}
        if len(parts) != len(frames) or len(parameter_sets) != 1:
            raise CodecError(f"NVENC gave {len(parts)} pictures for {len(frames)}, of {len(parameter_sets)} kinds")
        encoded = EncodedPictures(parameter_sets.pop(), tuple(picture for _, picture in parts))
        # Pictures in host memory and on the device reach the engine in two ways.
        if self._verified.get((rows, width, is_on_host)) != encoded.parameter_sets:
            self._verify(encoded, first())
            self._verified[rows, width, is_on_host] = encoded.parameter_sets
        return encoded

    def close(self) -> None:
        """See ``PictureEncoder.close``: no session outlives a call."""

    def _session(self, rows: int, width: int, frames: Sequence[Any], is_on_host: bool) -> Sequence[bytes]:
        """Access units of frames, through a session of their own: it gives pictures late, and the last when flushed.

        Whether a session that was flushed takes more pictures is not documented.
        """
        encoder = self._library.CreateEncoder(
            width, rows * 2 // 3, "NV12", is_on_host, gpu_id=self._device, cudacontext=0, **_OPTIONS
        )
        kinds = self._library.NV_ENC_PIC_FLAGS
        flags = int(kinds.FORCEIDR.value) | int(kinds.OUTPUT_SPSPPS.value)
        units = [unit for frame in frames for unit in encoder.Encode(frame, flags)]
        units += encoder.EndEncode()
        return [bytes(unit["data"]) for unit in units]

    def _verify(self, encoded: EncodedPictures, canvas: Canvases) -> None:
        decoded = SoftwareDecoder().decode(encoded.parameter_sets, encoded.pictures[:1])
        if not np.array_equal(decoded, canvas[None]):
            raise CodecError("what NVENC encodes does not decode to the same samples: it is not lossless here")


class _DevicePlane:
    """A plane in device memory, as the library asks for it."""

    def __init__(self, address: int, shape: tuple[int, int, int]) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


class _DeviceFrame:
    """A canvas in device memory: what the library takes where it is told that input is not on the CPU."""

    def __init__(self, address: int, rows: int, width: int) -> None:
        height = rows * 2 // 3
        luma = _DevicePlane(address, (height, width, 1))
        chroma = _DevicePlane(address + height * width, (height // 2, width // 2, 2))
        self._planes = [luma, chroma]

    def cuda(self) -> list[_DevicePlane]:
        """Luma, and chroma interleaved."""
        return self._planes


class NvencEncoders:
    """An ``EncoderSource`` of one device."""

    name = "nvenc"
    takes_device_canvases = True

    def __init__(self, library: Any, device: int) -> None:
        self._library = library
        self._device = device

    def encoder(self, *, uniform_blocks: bool = False) -> NvencEncoder:
        """See ``EncoderSource.encoder``; an engine chooses its blocks itself."""
        return NvencEncoder(self._library, self._device)

    def close(self) -> None:
        """Nothing is shared."""
