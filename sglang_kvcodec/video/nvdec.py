"""Pictures decoded by NVIDIA's video engines, through PyNvVideoCodec 2.2.

What its documentation does not say and this module stands on, found in its wheel and by tracing it:

- A decoder's frames lie in buffers of its own that the next ``Decode`` fills again, whatever still refers to them. They
  do not keep the decoder alive either: none may outlive it, so that here none outlives the call that made it.
- Errors are printed, not raised: whoever uses the planes checks their digest.
- Damaged parameter sets end the process with a segmentation fault (2.2.4 with driver 580.159): what it gets is read to
  the last bit before, see ``parameter_sets``.
- Pictures of another size than the decoder was made for are scaled to that size, silently: one decoder for each size.
- A whole segment with the end-of-stream flag gives all its pictures in one call, in buffers of their own.
- With a stream of one's own it does not synchronise: planes are valid in that stream's order.
- The variant with asynchronous allocations leaks.

Seen on an H200: what is above, and that damaged pictures are concealed, which the digests find
(``benchmarks/results``).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import CodecError, ConfigurationError
from sglang_kvcodec.format.spec import is_picture_size
from sglang_kvcodec.interpreter import BACKGROUND_TURN
from sglang_kvcodec.video.base import Canvases, DecodedFrames
from sglang_kvcodec.video.segments import SegmentMemory, check_units, joined_segment
from sglang_kvcodec.video.software import SoftwareEncoder

logger = logging.getLogger(__name__)

DECODERS_PER_ENGINE = 2
"""One thread both feeds a decoder and waits for its pictures, so that one decoder leaves an engine idle in between."""
MAX_SIZES = 2
"""Decoders of so many picture sizes are kept, or of as many as were prepared; the one that was not used for longest
goes first. Two: of pages with a calibration and of those without."""
_DECODE_SURFACES, _OUTPUT_SURFACES = 9, 2
"""What PyNvVideoCodec asks for: the stream's picture buffer and four more, and what is mapped."""
_SESSION_BYTES = 32 << 20
"""Of the driver, for each decoder. An assumption; the start-up log says what a device really took."""


class Driver(Protocol):
    """The part of ``CudaDriver`` that a decoder uses; see there."""

    device: int

    def new_stream(self) -> int: ...  # noqa: D102
    def return_stream(self, stream: int) -> None: ...  # noqa: D102
    def synchronize(self, stream: int) -> None: ...  # noqa: D102
    def copy_to_host(self, target: npt.NDArray[np.uint8], address: int, pitch_bytes: int, stream: int) -> None: ...  # noqa: D102
    def free_bytes(self) -> int: ...  # noqa: D102


def reserved_bytes(sizes: Sequence[tuple[int, int]], pictures: int, decoders: int) -> int:
    """GPU memory to leave free for decoders, which allocate outside of torch's pool; an estimate on the safe side.

    Args:
        sizes: width and height of pictures.
        pictures: the most of one call: a decoder keeps a buffer for each.
        decoders: how many there will be.
    """
    buffers = pictures + _DECODE_SURFACES + _OUTPUT_SURFACES
    return decoders * sum(_SESSION_BYTES + buffers * width * height * 3 // 2 for width, height in sizes)


class _Picture(NamedTuple):
    """What a frame of the library says of itself."""

    shape: tuple[int, ...]
    pitch_bytes: int
    addresses: tuple[int, int]


def _decoded(decoder: Any, packet: Any) -> list[_Picture]:
    """What came out of one call. Of the library's frames nothing is left, in the traceback of an error either.

    Raises:
        CodecError: the library failed.
    """
    try:
        return _described(decoder.Decode(packet))
    except Exception as error:
        # Its exceptions have no base of their own.
        reason = str(error)
    raise CodecError(f"NVDEC failed: {reason}")


def _described(frames: Sequence[Any]) -> list[_Picture]:
    with BACKGROUND_TURN:
        return [
            _Picture(
                tuple(frame.shape),
                int(frame.strides[0]),
                (int(frame.GetPtrToPlane(0)), int(frame.GetPtrToPlane(1))),
            )
            for frame in frames
        ]


class NvdecDecoder:
    """A ``FrameDecoder`` on a stream of its own. For one thread at a time."""

    name = "nvdec"

    def __init__(self, library: Any, driver: Driver, most_sizes: int = MAX_SIZES) -> None:
        """Opens nothing on the engines yet: that takes the size of the first pictures.

        Args:
            library: the module PyNvVideoCodec.
            driver: of the device to decode on.
            most_sizes: of pictures, for which sessions are kept.
        """
        self._library = library
        self._driver = driver
        self._most_sizes = most_sizes
        self.stream = driver.new_stream()
        self._memory = SegmentMemory()
        self._of_size: dict[tuple[int, int], Any] = {}
        """In the order of their last use."""

    @property
    def device(self) -> int:
        """See ``FrameDecoder.device``."""
        return self._driver.device

    def decode_frames(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> DecodedFrames:
        """See ``FrameDecoder.decode_frames``: planes on the device, in the order of :attr:`stream`."""
        with BACKGROUND_TURN:
            picture_format, segment = joined_segment(parameter_sets, pictures, self._memory)
        check_units(segment, len(pictures))
        width, height = size = picture_format.width, picture_format.height
        if not is_picture_size(width, height):
            raise CodecError(f"pictures of {width}x{height}, which not every engine decodes")
        try:
            return self._checked(_decoded(self._decoder(size), self._packet(segment)), len(pictures), size)
        except CodecError as error:
            self._lose(size, error)
            raise

    def decode(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> Canvases:
        """See ``PictureDecoder.decode``: a copy in host memory."""
        frames = self.decode_frames(parameter_sets, pictures)
        canvases = np.empty((len(frames), *frames.canvas_shape), np.uint8)
        height = frames.height
        for canvas, luma, chroma in zip(canvases, frames.luma_addresses, frames.chroma_addresses, strict=True):
            self._driver.copy_to_host(canvas[:height], int(luma), frames.pitch_bytes, self.stream)
            self._driver.copy_to_host(canvas[height:], int(chroma), frames.pitch_bytes, self.stream)
        self._driver.synchronize(self.stream)
        return canvases

    def replace(self) -> None:
        """See ``FrameDecoder.replace``."""
        for size in list(self._of_size):
            self._lose(size, "what it gave was wrong")

    def close(self) -> None:
        """Releases the decoders and the stream; the planes are gone then."""
        self._driver.synchronize(self.stream)
        self._of_size.clear()
        self._driver.return_stream(self.stream)

    def _decoder(self, size: tuple[int, int]) -> Any:
        decoder = self._of_size.pop(size, None)
        if decoder is None:
            while len(self._of_size) >= self._most_sizes:
                # What was queued may still read its buffers.
                self._driver.synchronize(self.stream)
                del self._of_size[next(iter(self._of_size))]
            decoder = self._library.CreateDecoder(
                gpuid=self._driver.device,
                codec=self._library.cudaVideoCodec.HEVC,
                cudacontext=0,
                cudastream=self.stream,
                usedevicememory=True,
                maxwidth=size[0],
                maxheight=size[1],
            )
        self._of_size[size] = decoder
        return decoder

    def _packet(self, segment: npt.NDArray[np.uint8]) -> Any:
        packet = self._library.PacketData()
        packet.bsl_data = segment.ctypes.data
        packet.bsl = segment.nbytes
        packet.decode_flag = int(self._library.VideoPacketFlag.ENDOFSTREAM.value)
        return packet

    def _checked(self, pictures: Sequence[_Picture], count: int, size: tuple[int, int]) -> DecodedFrames:
        width, height = size
        if len(pictures) != count:
            raise CodecError(f"{len(pictures)} pictures came out of {count}")
        for picture in pictures:
            if picture.shape != (height * 3 // 2, width):
                raise CodecError(f"a picture of shape {picture.shape} came out, not of {width}x{height}")
        pitches = {picture.pitch_bytes for picture in pictures}
        if len(pitches) != 1 or min(pitches) < width:
            raise CodecError(f"pictures with rows at distances of {sorted(pitches)} bytes came out")
        luma, chroma = np.array([picture.addresses for picture in pictures], np.int64).T
        if len(set(luma.tolist())) != count:
            raise CodecError("pictures of one call lie in the same place")
        return DecodedFrames(luma, chroma, pitches.pop(), width, height, self._driver.device, self.stream)

    def _lose(self, size: tuple[int, int], reason: object) -> None:
        """Gives up the decoder of a size: what it will do next is anyone's guess."""
        self._driver.synchronize(self.stream)
        if self._of_size.pop(size, None) is not None:
            metrics.DECODERS_REPLACED.inc()
            logger.error("kvcodec: an NVDEC decoder of %dx%d is replaced: %s", *size, reason)


class NvdecDecoders:
    """A ``DecoderSource`` of one device."""

    name = "nvdec"

    def __init__(self, library: Any, driver: Driver, engines: int, threads: int) -> None:
        """Opens nothing yet.

        Args:
            library: the module PyNvVideoCodec.
            driver: of the device to decode on.
            engines: of the device.
            threads: at least; more if it takes more to keep the engines busy.
        """
        self._library = library
        self._driver = driver
        self.threads = max(threads, DECODERS_PER_ENGINE * engines)
        self.used_bytes = 0
        """Of the device, by the decoders, as found when they were prepared."""
        self._most_sizes = MAX_SIZES
        self._ready: queue.SimpleQueue[NvdecDecoder] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._all: list[NvdecDecoder] = []

    def prepare(
        self, sizes: Sequence[tuple[int, int]], pictures: int, *, most_bytes: int | None = None, bytes_beside: int = 0
    ) -> None:
        """See ``DecoderSource.prepare``. Each decoder has to give, bit for bit, what was encoded."""
        free_bytes = self._driver.free_bytes()
        self._most_sizes = max(MAX_SIZES, len(sizes))
        segments = [_test_segment(size, pictures) for size in sizes]
        try:
            for number in range(self.threads):
                if most_bytes is not None and not self._fits(number, free_bytes, most_bytes, bytes_beside, len(sizes)):
                    self.threads = number
                    break
                decoder = self._open()
                for canvases, parameter_sets, coded in segments:
                    # Twice: the second time into buffers that are there already.
                    for _ in range(2):
                        if not np.array_equal(decoder.decode(parameter_sets, coded), canvases):
                            raise ConfigurationError("NVDEC gives other samples than were encoded")
                self._ready.put(decoder)
        except CodecError as error:
            raise ConfigurationError(f"NVDEC does not decode what it will have to: {error}") from error
        self.used_bytes = max(0, free_bytes - self._driver.free_bytes())
        if most_bytes is not None and self.used_bytes + self.threads * bytes_beside > most_bytes:
            raise ConfigurationError(
                f"{self.threads} NVDEC decoders take {self.used_bytes >> 20} MiB of GPU memory, and what restores "
                f"their pictures {self.threads * bytes_beside >> 20} MiB, of {most_bytes >> 20} MiB allowed"
            )
        metrics.DECODER_BYTES.set(self.used_bytes)
        logger.info(
            "kvcodec: %d NVDEC decoders for pictures of %s are warm; they took %d MiB of GPU memory",
            self.threads,
            ", ".join(f"{width}x{height}" for width, height in sizes),
            self.used_bytes >> 20,
        )

    def _fits(self, number: int, free_bytes: int, most_bytes: int, bytes_beside: int, sizes: int) -> bool:
        """Whether one more is within the bound, by what those that are open took on average."""
        if not number:
            return True
        each = max(0, free_bytes - self._driver.free_bytes()) / number
        # Sessions for sizes that are not known yet may come.
        each *= self._most_sizes / sizes
        if (number + 1) * (each + bytes_beside) <= most_bytes:
            return True
        logger.warning(
            "kvcodec: %d NVDEC decoders instead of %d: one takes %d MiB of GPU memory and restoring its pictures %d "
            "MiB, of %d MiB allowed in all (--kvcodec-gpu-memory)",
            number,
            self.threads,
            int(each) >> 20,
            bytes_beside >> 20,
            most_bytes >> 20,
        )
        return False

    def decoder(self) -> NvdecDecoder:
        """A warm one while there are any left, then a new one."""
        try:
            return self._ready.get_nowait()
        except queue.Empty:
            return self._open()

    def close(self) -> None:
        """See ``DecoderSource.close``."""
        with self._lock:
            decoders, self._all = self._all, []
        for decoder in decoders:
            decoder.close()

    def _open(self) -> NvdecDecoder:
        decoder = NvdecDecoder(self._library, self._driver, self._most_sizes)
        with self._lock:
            self._all.append(decoder)
        return decoder


def _test_segment(size: tuple[int, int], pictures: int) -> tuple[Canvases, bytes, list[bytes]]:
    """Canvases, and what they are coded: two different pictures in turn, one of noise and one that uses all values."""
    width, height = size
    shape = (height * 3 // 2, width)
    noise = np.random.default_rng(0).normal(128, 3, shape).round().clip(0, 255).astype(np.uint8)
    ramp = (np.arange(shape[0] * shape[1], dtype=np.uint32) * 7 >> 3).astype(np.uint8).reshape(shape)
    two = np.stack([noise, ramp])
    encoded = SoftwareEncoder().encode(two)
    turns = [index % 2 for index in range(pictures)]
    return two[turns], encoded.parameter_sets, [encoded.pictures[turn] for turn in turns]
