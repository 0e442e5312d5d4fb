"""The interface of a picture codec: 8-bit NV12 canvases to coded pictures and back, lossless of the 8-bit values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Canvases = npt.NDArray[np.uint8]
"""uint8 ``(pictures, height * 3 // 2, width)``: luma rows, then rows of interleaved chroma bytes. C-contiguous."""


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


class EncoderSource(Protocol):
    """Gives each thread an encoder. Thread-safe."""

    name: str

    def encoder(self, *, uniform_blocks: bool = False) -> PictureEncoder:
        """An encoder for one thread.

        Args:
            uniform_blocks: for pictures of components, whose statistics do not change within a block of 32 x 32.
        """
        ...

    def close(self) -> None:
        """Releases what the encoders share; a call of one that is under way fails."""
        ...


class PictureDecoder(Protocol):
    """Decodes pictures of one size. Used by one thread at a time."""

    name: str

    def decode(self, parameter_sets: bytes, pictures: Sequence[bytes]) -> Canvases:
        """Decodes a segment: one canvas per picture, in order.

        What it returns is valid until the next call of ``decode`` on the same decoder.

        Raises:
            CodecError: not decodable, or another number or size of pictures came out.
        """
        ...

    def close(self) -> None:
        """Releases the decoder."""
        ...
