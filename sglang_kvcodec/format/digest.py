"""Digests of coded bytes and of decoded planes.

The plane digest is made to be computed by a GPU kernel in any order: the picture's bytes as little-endian 32-bit words
``w[i]`` give ``sum((w[i] + 1) * m[i]) mod 2**64`` with odd multipliers ``m[i] = splitmix64(i) | 1`` (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). It finds accidents, not attacks.
"""

from __future__ import annotations

import functools
import hashlib
import zlib

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.errors import FormatError

Buffer = bytes | bytearray | memoryview

ARTIFACT_DIGEST_BYTES = 32
"""Of the SHA-256 that names a calibration artifact, and of the digest that names the model it is for."""


def artifact_digest(artifact: Buffer) -> bytes:
    """SHA-256 (FIPS 180-4) of a calibration artifact: its name, 32 bytes."""
    return hashlib.sha256(artifact).digest()


def bytes_crc32(data: Buffer) -> int:
    """CRC-32 (ISO 3309) of ``data``."""
    return zlib.crc32(data)


@functools.lru_cache(maxsize=8)
def plane_multipliers(words: int) -> npt.NDArray[np.uint64]:
    """The first ``words`` multipliers of the plane digest."""
    with np.errstate(over="ignore"):
        z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    result.setflags(write=False)
    return result


def plane_digest(picture: npt.NDArray[np.uint8]) -> int:
    """Digest of one NV12 picture, uint8 of any shape, C-contiguous, a multiple of four bytes.

    Raises:
        FormatError: not such an array.
    """
    if picture.dtype != np.uint8 or not picture.flags.c_contiguous or picture.size % 4:
        raise FormatError("a plane digest needs contiguous uint8 in a multiple of four bytes")
    words = picture.reshape(-1).view("<u4").astype(np.uint64)
    words += np.uint64(1)
    with np.errstate(over="ignore"):
        return int(np.dot(words, plane_multipliers(words.size)))
