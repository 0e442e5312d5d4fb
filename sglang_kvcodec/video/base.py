"""The interface of a picture codec: 8-bit NV12 canvases to coded pictures and back, lossless of the 8-bit values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Canvases = npt.NDArray[np.uint8]
"""uint8 ``(pictures, height * 3 // 2, width)``: luma rows, then rows of interleaved chroma bytes. C-contiguous."""


@dataclasses.dataclass(frozen=True)
class DeviceCanvases:
    """Canvases of one size in the memory of an encoder's device, written and left alone until they are encoded.

    Attributes:
        address: of the first; the others follow without a gap, and so do the rows.
        pictures: how many.
        rows: of each canvas, ``height * 3 // 2``.
        width: bytes of a row.
        to_host: a canvas ``(rows, width)`` by its index, copied to host memory.
    """

    address: int
    pictures: int
    rows: int
    width: int
    to_host: Callable[[int], Canvases]

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of ``Canvases``."""
        return (self.pictures, self.rows, self.width)


@dataclasses.dataclass(frozen=True)
class EncodedPictures:
    """Coded pictures.

    Attributes:
        parameter_sets: VPS, SPS and PPS in Annex B form; the same bytes for every picture of one geometry and encoder.
        pictures: one access unit each, an IDR in Annex B form without parameter sets, which decodes alone.
    """

    parameter_sets: bytes
    pictures: tuple[bytes, ...]


class PictureEncoder(Protocol):
    """Encodes canvases of one size. Used by one thread at a time."""

    name: str

    def encode(self, canvases: Canvases) -> EncodedPictures:
        """Codes each canvas as one picture.

        Raises:
            CodecError: the encoder failed.
        """
        ...

    def close(self) -> None:
        """Releases the encoder."""
        ...


class DeviceEncoder(PictureEncoder, Protocol):
    """An encoder that can take pictures from the memory of its device."""

    def encode_device(self, canvases: DeviceCanvases) -> EncodedPictures:
        """As ``encode``, without a copy to the host.

        Raises:
            CodecError: as ``encode``.
        """
        ...


class EncoderSource(Protocol):
    """Gives each thread an encoder. Thread-safe."""

    name: str
    takes_device_canvases: bool
    """Whether its encoders are ``DeviceEncoder``."""

    def encoder(self, *, uniform_blocks: bool = False) -> PictureEncoder:
        """An encoder for one thread.

        Args:
            uniform_blocks: for pictures of components, whose statistics do not change within a block of 32 x 32.
        """
        ...

    def close(self) -> None:
        """Releases what the encoders share; a call of one that is under way fails."""
        ...


@dataclasses.dataclass(frozen=True)
class DecodedFrames:
    """Where the planes of decoded pictures lie: NV12, one luma and one chroma plane each, all of one size and pitch.

    They are the decoder's own, and valid until its next call: after that it writes other pictures there. On a
    device they are written in the order of ``stream``: who reads them does so on that stream, or after an event
    recorded on it. Reading on that stream alone makes it safe to call the decoder again without waiting for the reader.

    Attributes:
        luma_addresses: int64 ``(pictures,)``: of ``height`` rows of ``width`` bytes.
        chroma_addresses: int64 ``(pictures,)``: of ``height // 2`` rows of ``width`` bytes, U and V interleaved.
        pitch_bytes: from one row to the next, in both planes.
        width: luma samples of a row.
        height: luma rows.
        device: ordinal of the CUDA device; None in host memory.
        stream: CUDA stream handle; 0 in host memory, where the planes are written when the call returns.
    """

    luma_addresses: npt.NDArray[np.int64]
    chroma_addresses: npt.NDArray[np.int64]
    pitch_bytes: int
    width: int
    height: int
    device: int | None = None
    stream: int = 0

    def __len__(self) -> int:
        return len(self.luma_addresses)

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Of each picture, as in ``PictureGeometry``."""
        return (self.height * 3 // 2, self.width)


class PictureDecoder(Protocol):
    """Decodes pictures of one size. Used by one thread at a time."""

    name: str

    def decode(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> Canvases:
        """Decodes a segment: one canvas per picture, in order.

        What it returns is valid until the next call of ``decode`` on the same decoder.

        Raises:
            CodecError: not decodable, or another number or size of pictures came out.
        """
        ...

    def close(self) -> None:
        """Releases the decoder."""
        ...


class FrameDecoder(PictureDecoder, Protocol):
    """A decoder that can leave pictures where it decoded them."""

    @property
    def device(self) -> int | None:
        """Ordinal of the CUDA device on which it leaves them; None in host memory."""
        ...

    def decode_frames(self, parameter_sets: bytes, pictures: Sequence[bytes | memoryview]) -> DecodedFrames:
        """As ``decode``, without a copy; see ``DecodedFrames`` for how long it is valid.

        Raises:
            CodecError: as ``decode``.
        """
        ...

    def replace(self) -> None:
        """Forgets all state, because what came out was wrong: the next call decodes with a fresh decoder."""
        ...


class DecoderSource(Protocol):
    """Gives each thread a decoder. Thread-safe."""

    name: str
    threads: int
    """How many decoders should work at once."""
    used_bytes: int
    """Of a GPU's memory, by the decoders that were prepared."""

    def prepare(
        self,
        sizes: Sequence[tuple[int, int]],
        pictures: int,
        *,
        most_bytes: int | None = None,
        bytes_beside: int = 0,
    ) -> None:
        """Opens and warms ``threads`` decoders, so that no request waits for it; fewer if they don't fit.

        Args:
            sizes: width and height of the pictures to come.
            pictures: the most of one call.
            most_bytes: GPU memory that all may take; None for no bound.
            bytes_beside: GPU memory that each will need besides, for what is done with its pictures.

        Raises:
            ConfigurationError: what a decoder gives is not what was encoded, or not one fits.
        """
        ...

    def decoder(self) -> FrameDecoder:
        """A decoder for one thread."""
        ...

    def close(self) -> None:
        """Releases all decoders; no thread may use one any more."""
        ...
