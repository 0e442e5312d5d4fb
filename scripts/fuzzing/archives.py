"""Archives of pages, what ``kvcodec admin export`` writes.

The first byte of an input says whether the CRCs of heads and objects are set to what is there (1) or not (0).
"""

from __future__ import annotations

import hashlib
import io
import struct

from fuzzing.pages import golden_objects
from fuzzing.target import Target, require
from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.digest import bytes_crc32
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_archive import ArchiveWriter, read_archive

RAW, SEALED = range(2)
_START_BYTES, _HEAD_BYTES, _END_BYTES = 8, 80, 20
_LENGTH_AT, _CRC_AT = 68, 76


def archive_of(data: bytes) -> bytes:
    """The archive that an input is."""
    kind, rest = (data[0] % 2, bytearray(data[1:])) if data else (RAW, bytearray())
    at = _START_BYTES
    while kind == SEALED and at + _HEAD_BYTES + 4 <= len(rest) and rest[at : at + 4] == b"PAGE":
        length = struct.unpack_from("<Q", rest, at + _LENGTH_AT)[0]
        stop = at + _HEAD_BYTES + 4 + length
        struct.pack_into("<I", rest, at + _CRC_AT, bytes_crc32(rest[at + _HEAD_BYTES + 4 : stop]))
        struct.pack_into("<I", rest, at + _HEAD_BYTES, bytes_crc32(rest[at : at + _HEAD_BYTES]))
        at = stop
    if kind == SEALED and at + _END_BYTES + 4 <= len(rest):
        struct.pack_into("<I", rest, at + _END_BYTES, bytes_crc32(rest[at : at + _END_BYTES]))
    return bytes(rest)


class _Counted(io.BytesIO):
    """Refuses reads of more than a page object, whatever the file says."""

    def read(self, size: int | None = -1) -> bytes:
        require(size is not None and 0 <= size <= 256 << 20, f"a read of {size} bytes")
        return super().read(size)


def check_archive(data: bytes) -> bool:
    """An archive that is read to its end is what a writer makes of what was read, unless it told of damage."""
    data = archive_of(data)
    out = io.BytesIO()
    writer = ArchiveWriter(out)
    has_damage = False
    try:
        for page in read_archive(_Counted(data)):
            has_damage |= page.is_damaged
            writer.add(page.key, page.data)
    except FormatError:
        return False
    writer.finish()
    require(has_damage or out.getvalue() == data, "an archive that nobody writes")
    require(len(out.getvalue()) == len(data), "an archive of another size")
    return True


def _seeds() -> list[bytes]:
    out = io.BytesIO()
    writer = ArchiveWriter(out)
    empty = io.BytesIO()
    ArchiveWriter(empty).finish()
    for data in (*golden_objects()[:2], b"no page object", b""):
        writer.add(PageKey(hashlib.sha256(b"namespace").digest(), hashlib.sha256(data).digest()), data)
    writer.finish()
    return [bytes([kind]) + each.getvalue() for kind in (RAW, SEALED) for each in (empty, out)]


TARGET = Target("archive", "archives of pages", check_archive, _seeds)
