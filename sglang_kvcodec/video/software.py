"""Pictures coded and decoded in software: libx265 and FFmpeg's HEVC decoder, through PyAV.

Both release Python's lock while they work, so threads with one object each use one core each.
"""

from __future__ import annotations

import fractions
from collections.abc import Iterator, Sequence

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.frame import PictureType

from sglang_kvcodec.errors import CodecError, ConfigurationError
from sglang_kvcodec.video.base import Canvases, DecodedFrames, EncodedPictures
from sglang_kvcodec.video.bitstream import split_access_unit
from sglang_kvcodec.video.segments import checked_segment

# What a hardware decoder accepts without doubt: Main profile, one slice, no wavefronts, blocks of 32 (levels from 5 on
# forbid smaller ones), every picture an IDR. That is asked for picture by picture, because with keyint=1 x265 states a
# profile of the range extensions. Look-ahead and frame threads are off, so that each picture comes out as soon as it
# went in and the encoder stays open.
_X265_PARAMS = ":".join(
    [
        "lossless=1",
        "keyint=-1",
        "bframes=0",
        "b-adapt=0",
        "ref=1",
        "ctu=32",
        "tu-intra-depth=2",
        "rc-lookahead=0",
        "scenecut=0",
        "no-open-gop=1",
        "slices=1",
        "no-wpp=1",
        "pools=none",
        "frame-threads=1",
        "no-sao=1",
        "no-deblock=1",
        "no-info=1",
        "annexb=1",
        "repeat-headers=1",
        "log-level=none",
    ]
)
_UNIFORM_BLOCKS = "min-cu-size=32:tu-intra-depth=1"
"""No search for smaller blocks: where statistics change slowly it finds nothing, and takes half of the time."""
_MAX_PIXELS = 8192 * 8192
"""FFmpeg refuses a damaged header that claims more."""


class SoftwareEncoder:
    """libx265, lossless of the 8-bit values, on one thread.

    Args:
        uniform_blocks: code luma in whole blocks of 32 x 32, twice as fast. Right for the canvases of
            ``transform/components.py``, which are made for it; others grow by some percent.
        preset: of x265. Slower ones gain next to nothing (docs/codec-study.md).
        more_params: more x265 parameters, which win over the others; for trials.
    """

    name = "software"

    def __init__(
        self, *, uniform_blocks: bool = False, preset: str = "ultrafast", more_params: Sequence[str] = ()
    ) -> None:
        _silence()
        self._preset = preset
        self._x265_params = ":".join([_X265_PARAMS, *([_UNIFORM_BLOCKS] if uniform_blocks else []), *more_params])
        self._context: av.VideoCodecContext | None = None
        self._shape = (0, 0)
        self._parameter_sets = b""
        self._next_pts = 0

    def encode(self, canvases: Canvases) -> EncodedPictures:
        """See ``PictureEncoder.encode``. Canvases of another size than last time reopen the encoder."""
        shape = (canvases.shape[1], canvases.shape[2])
        try:
            if self._context is None or shape != self._shape:
                self._open(shape)
            pictures = tuple(self._encode_one(canvas) for canvas in canvases)
        except (FFmpegError, ValueError) as error:
            self.close()
            raise CodecError(f"libx265 failed: {error}") from error
        return EncodedPictures(self._parameter_sets, pictures)

    def close(self) -> None:
        """See ``PictureEncoder.close``."""
        self._context = None
        self._parameter_sets = b""

    def _open(self, shape: tuple[int, int]) -> None:
        self.close()
        context = av.VideoCodecContext.create("libx265", "w")
        context.width, context.height, context.pix_fmt = shape[1], shape[0] * 2 // 3, "yuv420p"
        context.time_base = fractions.Fraction(1, 25)
        context.thread_count = 1
        context.options = {"preset": self._preset, "x265-params": self._x265_params, "forced-idr": "1"}
        context.open()
        self._context, self._shape, self._next_pts = context, shape, 0

    def _encode_one(self, canvas: npt.NDArray[np.uint8]) -> bytes:
        assert self._context is not None
        frame = _to_frame(canvas)
        frame.pict_type = PictureType.I
        frame.pts = self._next_pts
        self._next_pts += 1
        packets = [bytes(packet) for packet in self._context.encode(frame)]
        if len(packets) != 1:
            raise CodecError(f"libx265 gave {len(packets)} pictures for one")
        parameter_sets, picture = split_access_unit(packets[0])
        if self._parameter_sets not in (b"", parameter_sets):
            raise CodecError("libx265 changed its parameter sets between pictures")
        self._parameter_sets = parameter_sets
        return picture


class SoftwareEncoders:
    """libx265 on the threads that ask for it."""

    name = "x265"
    takes_device_canvases = False

    def encoder(self, *, uniform_blocks: bool = False) -> SoftwareEncoder:
        """See ``EncoderSource.encoder``."""
        return SoftwareEncoder(uniform_blocks=uniform_blocks)

    def close(self) -> None:
        """Nothing is shared."""


class SoftwareDecoder:
    """FFmpeg's HEVC decoder on one thread. Every call starts afresh: nothing damaged outlives its segment."""

    name = "software"
    device: int | None = None

    def __init__(self) -> None:
        _silence()
        self._canvases: Canvases | None = None

    def decode_frames(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> DecodedFrames:
        """See ``FrameDecoder.decode_frames``: planes in host memory."""
        self._canvases = canvases = self.decode(parameter_sets, pictures)
        count, rows, width = canvases.shape
        height = rows * 2 // 3
        luma = canvases.ctypes.data + np.arange(count, dtype=np.int64) * (rows * width)
        return DecodedFrames(luma, luma + height * width, width, width, height)

    def replace(self) -> None:
        """See ``FrameDecoder.replace``; there is no state."""

    def decode(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> Canvases:
        """See ``PictureDecoder.decode``."""
        # It may know what to do with more, but what one decoder takes all of them should, and writers be told.
        picture_format, _ = checked_segment(parameter_sets, pictures)
        context = av.VideoCodecContext.create("hevc", "r")
        context.thread_count = 1
        context.options = {"max_pixels": str(_MAX_PIXELS), "err_detect": "explode"}
        canvases: Canvases | None = None
        decoded = 0
        try:
            for frame in _decode_frames(context, parameter_sets, pictures):
                if canvases is None:
                    shape = (len(pictures), picture_format.height * 3 // 2, picture_format.width)
                    canvases = np.empty(shape, np.uint8)
                if decoded == len(pictures):
                    raise CodecError(f"more than {decoded} pictures came out")
                _from_frame(frame, canvases[decoded])
                decoded += 1
        except (FFmpegError, ValueError) as error:
            raise CodecError(f"FFmpeg can't decode the pictures: {error}") from error
        if canvases is None or decoded != len(pictures):
            raise CodecError(f"{decoded} pictures came out of {len(pictures)}")
        return canvases

    def close(self) -> None:
        """See ``PictureDecoder.close``."""
        self._canvases = None


class SoftwareDecoders:
    """FFmpeg's decoder on the threads that ask for it."""

    name = "software"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.used_bytes = 0

    def prepare(
        self, sizes: Sequence[tuple[int, int]], pictures: int, *, most_bytes: int | None = None, bytes_beside: int = 0
    ) -> None:
        """See ``DecoderSource.prepare``; a decoder opens in no time and takes nothing of a GPU.

        Raises:
            ConfigurationError: see there.
        """
        if most_bytes is not None and bytes_beside:
            fitting = most_bytes // bytes_beside
            if fitting < 1:
                raise ConfigurationError(f"restoring takes {bytes_beside >> 20} MiB, of {most_bytes >> 20} MiB allowed")
            self.threads = min(self.threads, fitting)

    def decoder(self) -> SoftwareDecoder:
        """See ``DecoderSource.decoder``."""
        return SoftwareDecoder()

    def close(self) -> None:
        """Nothing is shared."""


def _decode_frames(
    context: av.VideoCodecContext, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]
) -> Iterator[av.VideoFrame]:
    for index, picture in enumerate(pictures):
        data = b"".join([parameter_sets, picture]) if index == 0 else bytes(picture)
        yield from context.decode(av.Packet(data))
    yield from context.decode(None)


def _plane(frame: av.VideoFrame, index: int, width: int) -> npt.NDArray[np.uint8]:
    """A view of the samples of a plane; its rows may lie further apart than they are wide."""
    plane = frame.planes[index]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, :width]


def _to_frame(canvas: npt.NDArray[np.uint8]) -> av.VideoFrame:
    height, width = canvas.shape[0] * 2 // 3, canvas.shape[1]
    frame = av.VideoFrame(width, height, "yuv420p")
    _plane(frame, 0, width)[:] = canvas[:height]
    _plane(frame, 1, width // 2)[:] = canvas[height:, 0::2]
    _plane(frame, 2, width // 2)[:] = canvas[height:, 1::2]
    return frame


def _from_frame(frame: av.VideoFrame, canvas: npt.NDArray[np.uint8]) -> None:
    height, width = frame.height, frame.width
    if frame.format.name != "yuv420p" or canvas.shape != (height * 3 // 2, width) or width % 2 or height % 2:
        raise CodecError(f"a picture of {width}x{height} {frame.format.name} among {canvas.shape[1]} wide ones")
    canvas[:height] = _plane(frame, 0, width)
    canvas[height:, 0::2] = _plane(frame, 1, width // 2)
    canvas[height:, 1::2] = _plane(frame, 2, width // 2)


def _silence() -> None:
    """FFmpeg prints what it thinks of damaged bytes; the typed error says it already."""
    av.logging.set_level(av.logging.PANIC)
