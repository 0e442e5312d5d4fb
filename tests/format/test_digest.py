import zlib

import numpy as np
import pytest

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.digest import bytes_crc32, plane_digest, plane_multipliers

MASK = (1 << 64) - 1


def splitmix64(index):
    z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_the_plane_digest_is_what_the_document_says():
    picture = np.random.default_rng(0).integers(0, 256, (24, 16), dtype=np.uint8)
    data = picture.tobytes()
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    expected = sum((word + 1) * (splitmix64(index) | 1) for index, word in enumerate(words)) & MASK
    assert plane_digest(picture) == expected


def test_known_values():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator seeded with 0
    assert int(plane_multipliers(1)[0]) == 0xE220A8397B1DCDAF
    assert bytes_crc32(b"123456789") == 0xCBF43926 == zlib.crc32(b"123456789")


def test_any_changed_byte_or_swapped_word_changes_the_digest():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (288, 192), dtype=np.uint8)
    digests = {plane_digest(picture)}
    for count in range(1, 200):
        changed = picture.copy()
        changed.reshape(-1)[rng.integers(changed.size)] ^= np.uint8(rng.integers(1, 256))
        digests.add(plane_digest(changed))
        assert len(digests) == count + 1
    words = picture.reshape(-1).view("<u4").copy()
    words[[0, 1]] = words[[1, 0]]
    assert plane_digest(words.view(np.uint8)) not in digests


def test_zeros_of_different_sizes_differ():
    assert plane_digest(np.zeros(4, np.uint8)) != plane_digest(np.zeros(8, np.uint8))


@pytest.mark.parametrize("picture", [np.zeros(6, np.uint8), np.zeros((4, 8), np.uint8)[:, ::2], np.zeros(4, np.int16)])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(FormatError):
        plane_digest(picture)
