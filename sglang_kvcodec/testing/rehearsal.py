"""A stand-in for PyNvVideoCodec 2.2 and NVIDIA's driver, to rehearse on a CPU what will run on a GPU.

It has the names and signatures of the wheel (2.2.4), decodes in software into "device" memory on the host, and keeps to
what is known of the wheel's behaviour, its traps above all: a decoder's buffers are filled again from the first at the
next call, damaged pictures are printed and handed out, another size is scaled in silence, frames do not keep their
decoder's memory. Nothing that is measured with it says anything of a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.base import Canvases
from sglang_kvcodec.video.bitstream import NAL_IDR_N_LP, NAL_IDR_W_RADL, nal_type, nal_units, to_annexb
from sglang_kvcodec.video.parameter_sets import check_parameter_sets
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder

FREED = 0xDD
"""What memory of a decoder that is gone is filled with."""


class PyNvVCException(Exception):
    """The wheel's own; it has no base but ``Exception``."""


class VideoPacketFlag(enum.Enum):
    """Flags of a packet."""

    ENDOFSTREAM = 1
    TIMESTAMP = 2
    DISCONTINUITY = 4
    ENDOFPICTURE = 8


class cudaVideoCodec(enum.Enum):
    """Codecs."""

    H264 = 4
    HEVC = 8
    AV1 = 11


class NV_ENC_PIC_FLAGS(enum.Enum):
    """Flags of a picture to encode."""

    FORCEINTRA = 1
    FORCEIDR = 2
    OUTPUT_SPSPPS = 4
    EOS = 8


class PacketData:
    """Bytes to decode, by address."""

    def __init__(self) -> None:
        self.bsl_data = 0
        self.bsl = 0
        self.decode_flag = 0
        self.pts = self.dts = 0


class RehearsalFrame:
    """A decoded picture, as long as its decoder leaves it alone."""

    def __init__(self, buffer: npt.NDArray[np.uint8], width: int, height: int) -> None:
        self._buffer = buffer
        self.shape = [height * 3 // 2, width]
        self.strides = [buffer.shape[1], 1]
        self._height = height

    def GetPtrToPlane(self, plane: int) -> int:
        """Address of a plane; no index is refused."""
        address: int = self._buffer.ctypes.data + plane * self._height * self._buffer.shape[1]
        return address


class RehearsalDecoder:
    """The wheel's ``PyNvDecoder``, for HEVC in NV12."""

    def __init__(self, library: RehearsalLibrary, max_size: tuple[int, int], options: dict[str, Any]) -> None:
        self.options = options
        self._library = library
        self._max_size = max_size
        self._size: tuple[int, int] | None = None
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def __del__(self) -> None:
        for buffer in self._buffers:
            buffer[:] = FREED
            self._library.freed.append(buffer)

    def Decode(self, packet: PacketData) -> list[RehearsalFrame]:
        """All pictures of a packet that ends its stream."""
        if packet.decode_flag != VideoPacketFlag.ENDOFSTREAM.value:
            raise NotImplementedError("pictures that are held back are not rehearsed")
        if (failure := self._library.next_failure()) is not None:
            raise failure
        stream = ctypes.string_at(packet.bsl_data, packet.bsl)
        parameter_sets, pictures = _access_units(stream)
        whole: list[Canvases] = []
        try:
            size = check_parameter_sets(parameter_sets)[:2]
        except CodecError:
            whole = _foreign(stream)
            if not whole:
                raise
            size = (whole[0].shape[1], whole[0].shape[0] * 2 // 3)
        if self._size is None:
            self._size = size
        if size[0] > self._max_size[0] or size[1] > self._max_size[1]:
            raise PyNvVCException("Reconfigure Not supported when width/height > maxwidth/maxheight")
        frames = [self._frame(number, _scaled(canvas, self._size)) for number, canvas in enumerate(whole)]
        for number, picture in enumerate([] if whole else pictures):
            try:
                canvas = SoftwareDecoder().decode(parameter_sets, [picture])[0]
            except CodecError:
                print(f"Decode Error occurred for picture {number}")
                canvas = _concealed(parameter_sets, picture, size)
            frames.append(self._frame(number, _scaled(canvas, self._size)))
        return frames

    def GetWidth(self) -> int:
        """Of the first picture, whatever came since."""
        return self._size[0] if self._size else 0

    def GetHeight(self) -> int:
        """Of the first picture, whatever came since."""
        return self._size[1] if self._size else 0

    def _frame(self, slot: int, canvas: Canvases) -> RehearsalFrame:
        rows, width = canvas.shape
        if slot == len(self._buffers):
            self._buffers.append(np.zeros((rows, width + self._library.pitch_padding), np.uint8))
        self._buffers[slot][:, :width] = canvas
        return RehearsalFrame(self._buffers[slot], width, rows * 2 // 3)


class RehearsalEncoder:
    """The wheel's ``PyNvEncoder``: libx265 that hands pictures out late."""

    DELAY = 3

    def __init__(
        self, library: RehearsalLibrary, size: tuple[int, int], is_on_host: bool, options: dict[str, Any]
    ) -> None:
        self.options = options
        self._library = library
        self._size = size
        self._is_on_host = is_on_host
        self._x265 = SoftwareEncoder()
        self._held: list[dict[str, Any]] = []
        self._has_ended = False

    def Encode(self, frame: Any, flags: int) -> list[dict[str, Any]]:
        """Takes a picture, an array in host memory or an object with planes; gives those that are ready."""
        if self._has_ended:
            raise PyNvVCException("the session has been flushed")
        width, height = self._size
        if not self._is_on_host:
            frame = _of_planes(frame.cuda(), width, height)
        if frame.size != height * 3 // 2 * width or flags != 6:
            raise PyNvVCException(f"frame of shape {frame.shape}, flags {flags}")
        canvas = frame.reshape(-1, width)
        if self._library.encodes_wrongly:
            canvas = canvas + np.uint8(1)
        encoded = self._x265.encode(canvas[None])
        self._held.append({"data": encoded.parameter_sets + encoded.pictures[0], "timestamp": 0, "picture_type": 3})
        ready, self._held = self._held[: -self.DELAY], self._held[-self.DELAY :]
        return ready

    def EndEncode(self) -> list[dict[str, Any]]:
        """The rest."""
        self._has_ended = True
        return self._held


class RehearsalLibrary:
    """The module PyNvVideoCodec.

    Attributes:
        engines: how many it claims.
        has_encoder: whether it claims to encode lossless HEVC.
        pitch_padding: bytes between the rows of a frame: 0 with the wheel, but the interface allows for it.
        encodes_wrongly: an encoder that is not lossless.
        created: the decoders that were asked for, by their options.
        freed: memory of decoders that are gone.
    """

    PacketData = PacketData
    VideoPacketFlag = VideoPacketFlag
    cudaVideoCodec = cudaVideoCodec
    cudaVideoChromaFormat = enum.Enum("cudaVideoChromaFormat", {"Monochrome": 0, "420": 1, "422": 2, "444": 3})
    NV_ENC_PIC_FLAGS = NV_ENC_PIC_FLAGS
    PyNvVCException = PyNvVCException

    def __init__(self, engines: int = 1, has_encoder: bool = True, pitch_padding: int = 0) -> None:
        self.engines = engines
        self.has_encoder = has_encoder
        self.pitch_padding = pitch_padding
        self.encodes_wrongly = False
        self.created: list[dict[str, Any]] = []
        self.freed: list[npt.NDArray[np.uint8]] = []
        self._failures: list[Exception] = []
        self._lock = threading.Lock()

    def fail_next(self, error: Exception) -> None:
        """Has the next ``Decode`` of any decoder raise."""
        self._failures.append(error)

    def next_failure(self) -> Exception | None:
        """What :meth:`fail_next` asked for, once."""
        with self._lock:
            return self._failures.pop(0) if self._failures else None

    def CreateDecoder(
        self,
        gpuid: int = 0,
        codec: Any = cudaVideoCodec.H264,
        cudacontext: int = 0,
        cudastream: int = 0,
        usedevicememory: bool = False,
        maxwidth: int = 0,
        maxheight: int = 0,
    ) -> RehearsalDecoder:
        """A decoder; the wheel has more arguments, of which none is to be used."""
        options = {"gpuid": gpuid, "codec": codec, "cudastream": cudastream, "usedevicememory": usedevicememory}
        self.created.append(options)
        return RehearsalDecoder(self, (maxwidth, maxheight), options)

    def CreateEncoder(
        self, width: int, height: int, fmt: str, usecpuinputbuffer: bool, **options: Any
    ) -> RehearsalEncoder:
        """An encoder."""
        if not self.has_encoder:
            raise PyNvVCException("Codec not supported on this GPU")
        if fmt != "NV12":
            raise NotImplementedError("other formats are not rehearsed")
        return RehearsalEncoder(self, (width, height), usecpuinputbuffer, options)

    def GetDecoderCaps(self, gpuid: int, codec: Any, chromaformat: Any, bitdepth: int) -> dict[str, int]:
        """Limits, as a Hopper's are said to be."""
        return {
            "supported": int(codec is cudaVideoCodec.HEVC and bitdepth == 8),
            "num_decoder_engines": self.engines,
            "width_min": 144,
            "height_min": 144,
            "width_max": 8192,
            "height_max": 8192,
            "mb_num_max": 262144,
        }

    def GetEncoderCaps(self, gpuid: int, codec: str) -> dict[str, int]:
        """Limits; an exception where there is no engine."""
        if not self.has_encoder:
            raise PyNvVCException("Codec not supported on this GPU")
        return {"num_encoder_engines": 1, "support_lossless_encode": int(codec == "hevc")}


class RehearsalDriver:
    """``CudaDriver`` without a device: addresses are those of host memory, and streams are numbers."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.device_name = "rehearsal on a CPU"
        self.cuda_version = "0.0"
        self.streams: list[int] = []
        self.free = 1 << 33

    def free_bytes(self) -> int:
        """Falls with each stream, so that something is counted."""
        return self.free - len(self.streams) * (1 << 20)

    def new_stream(self) -> int:
        """A number that was none before."""
        self.streams.append(max(self.streams, default=0x7000) + 1)
        return self.streams[-1]

    def return_stream(self, stream: int) -> None:
        """Refuses one that is not there."""
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        """Everything has happened already."""

    def copy_to_host(self, target: npt.NDArray[np.uint8], address: int, pitch_bytes: int, stream: int) -> None:
        """Copies rows."""
        if stream not in self.streams:
            raise CodecError(f"there is no stream {stream}")
        for row, line in enumerate(target):
            ctypes.memmove(line.ctypes.data, address + row * pitch_bytes, line.nbytes)


def _access_units(stream: bytes) -> tuple[bytes, list[bytes]]:
    """The first parameter sets of a stream, and its pictures. Later parameter sets are as good as the first here."""
    sets: list[bytes] = []
    pictures = []
    for unit in nal_units(stream):
        kind = nal_type(unit) if unit else -1
        if kind in (NAL_IDR_W_RADL, NAL_IDR_N_LP):
            pictures.append(to_annexb([unit]))
        elif len(sets) < 3 and not pictures:
            sets.append(unit)
    return to_annexb(sets), pictures


def _foreign(stream: bytes) -> list[Canvases]:
    """The pictures of a stream that no decoder here would pass on, in output order."""
    context = av.VideoCodecContext.create("hevc", "r")
    canvases = []
    for frame in [*(f for packet in context.parse(stream) for f in context.decode(packet)), *_flushed(context)]:
        luma, *chroma = (
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
            for plane in frame.planes
        )
        canvases.append(np.concatenate([luma, np.stack(chroma, -1).reshape(len(chroma[0]), -1)]))
    return canvases


def _flushed(context: Any) -> list[Any]:
    """What the decoder still held, and what the parser did."""
    return [*(frame for packet in context.parse(None) for frame in context.decode(packet)), *context.decode(None)]


def _concealed(parameter_sets: bytes, picture: bytes, size: tuple[int, int]) -> Canvases:
    """What a decoder makes of a damaged picture that must give one: what FFmpeg gets out of it, or grey."""
    grey = np.full((size[1] * 3 // 2, size[0]), 128, np.uint8)
    context = av.VideoCodecContext.create("hevc", "r")
    try:
        frames = [*context.decode(av.Packet(parameter_sets + picture)), *context.decode(None)]
    except (FFmpegError, ValueError):
        return grey
    for frame in frames:
        if (frame.width, frame.height) == size and frame.format.name == "yuv420p":
            grey[: size[1]] = frame.reformat(format="gray").to_ndarray()
    return grey


def _of_planes(planes: Sequence[Any], width: int, height: int) -> npt.NDArray[np.uint8]:
    """The bytes of NV12 planes that are described by ``__cuda_array_interface__``, and lie in host memory here."""
    described = [plane.__cuda_array_interface__ for plane in planes]
    if [each["shape"] for each in described] != [(height, width, 1), (height // 2, width // 2, 2)] or any(
        (each["typestr"], each["strides"]) != ("|u1", None) for each in described
    ):
        raise PyNvVCException(f"planes {described}")
    parts = [ctypes.string_at(each["data"][0], int(np.prod(each["shape"]))) for each in described]
    return np.frombuffer(b"".join(parts), np.uint8)


def _scaled(canvas: Canvases, size: tuple[int, int]) -> Canvases:
    """Nearest neighbours; an engine does better, and is as wrong."""
    width, height = size
    if canvas.shape == (height * 3 // 2, width):
        return canvas
    rows = np.arange(height * 3 // 2) * canvas.shape[0] // (height * 3 // 2)
    columns = np.arange(width) * canvas.shape[1] // width
    scaled: Canvases = canvas[rows][:, columns]
    return scaled


def addresses_to_canvases(
    luma: Sequence[int], chroma: Sequence[int], pitch_bytes: int, width: int, height: int
) -> Canvases:
    """Planes in host memory, by their addresses, as canvases: what a kernel on a GPU would see."""
    canvases = np.empty((len(luma), height * 3 // 2, width), np.uint8)
    for canvas, luma_at, chroma_at in zip(canvases, luma, chroma, strict=True):
        for first, at, rows in ((0, luma_at, height), (height, chroma_at, height // 2)):
            for row in range(rows):
                ctypes.memmove(canvas[first + row].ctypes.data, int(at) + row * pitch_bytes, width)
    return canvases
