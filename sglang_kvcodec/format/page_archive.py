"""Page objects in a file, one after the other: what ``kvcodec admin export`` writes. No pickle, nothing is executed.

All integers are little-endian::

    "KVPA" | u16 version = 1 | u16 0
    per object:  "PAGE" | 32 bytes namespace digest | 32 bytes page hash | u64 length | u32 CRC-32 of the object
                 | u32 CRC-32 of the 80 bytes before | the object
    at the end:  "DONE" | u64 objects | u64 bytes of them all | u32 CRC-32 of the 20 bytes before

The head of an object has a CRC of its own, so that one whose bytes are damaged can be skipped. A file without its end
was cut. Both writer and reader hold one object.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import ChecksumError, FormatError, TruncatedError, UnknownFormatError
from sglang_kvcodec.format.digest import bytes_crc32
from sglang_kvcodec.format.namespace import PageKey

MAGIC = b"KVPA"
VERSION = 1
_START = struct.Struct("<4sHH")
_PAGE = struct.Struct("<4s64sQI")
_END = struct.Struct("<4sQQ")
_CRC = struct.Struct("<I")
_PAGE_MARK = b"PAGE"
_END_MARK = b"DONE"


class ArchivedPage(NamedTuple):
    """An object of an archive. ``is_damaged``: its bytes are not those that were written."""

    key: PageKey
    data: bytes
    is_damaged: bool


class ArchiveWriter:
    """Writes an archive; one that is not finished is refused by its reader."""

    def __init__(self, file: BinaryIO) -> None:
        """Begins it at the position of ``file``, which stays the caller's to close."""
        self._file = file
        self.objects = 0
        self.object_bytes = 0
        file.write(_START.pack(MAGIC, VERSION, 0))

    def add(self, key: PageKey, data: bytes) -> None:
        """Appends an object."""
        self._write_with_crc(_PAGE.pack(_PAGE_MARK, key.to_bytes(), len(data), bytes_crc32(data)))
        self._file.write(data)
        self.objects += 1
        self.object_bytes += len(data)

    def finish(self) -> None:
        """Writes the end."""
        self._write_with_crc(_END.pack(_END_MARK, self.objects, self.object_bytes))

    def _write_with_crc(self, head: bytes) -> None:
        self._file.write(head + _CRC.pack(bytes_crc32(head)))


def read_archive(file: BinaryIO) -> Iterator[ArchivedPage]:
    """The objects of an archive in their order.

    Raises:
        UnknownFormatError: no archive, or one of another version.
        TruncatedError: it ends before its end.
        ChecksumError: a head is damaged, so that nothing after it can be found.
        FormatError: something else stands where a head should, or something follows the end.
    """
    magic, version, reserved = _START.unpack(_exactly(file, _START.size))
    if magic != MAGIC or version != VERSION or reserved:
        raise UnknownFormatError(f"not an archive of pages of version {VERSION}")
    objects = object_bytes = 0
    while True:
        mark = _exactly(file, len(_PAGE_MARK))
        if mark == _END_MARK:
            break
        if mark != _PAGE_MARK:
            raise FormatError(f"no page begins after {objects} pages")
        _, key, length, crc32 = _PAGE.unpack(_head(file, mark, _PAGE.size))
        if length > MAX_OBJECT_BYTES:
            raise FormatError(f"an object of {length} bytes after {objects} pages")
        data = _exactly(file, length)
        objects += 1
        object_bytes += length
        yield ArchivedPage(PageKey.from_bytes(key), data, bytes_crc32(data) != crc32)
    _, told_objects, told_bytes = _END.unpack(_head(file, mark, _END.size))
    if (told_objects, told_bytes) != (objects, object_bytes):
        raise TruncatedError(
            f"{objects} pages of {object_bytes} bytes, where there were {told_objects} of {told_bytes}"
        )
    if file.read(1):
        raise FormatError("something follows the end of the archive")


def _head(file: BinaryIO, mark: bytes, size_bytes: int) -> bytes:
    head = mark + _exactly(file, size_bytes - len(mark))
    if _CRC.unpack(_exactly(file, _CRC.size))[0] != bytes_crc32(head):
        raise ChecksumError("a head in the archive is damaged")
    return head


def _exactly(file: BinaryIO, size_bytes: int) -> bytes:
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise TruncatedError("the archive ends before its end")
    return data
