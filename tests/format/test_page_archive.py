"""Archives of pages: what was written comes back, and what was cut or changed never passes for it."""

import io
import random
import struct
import zlib

import pytest

from sglang_kvcodec.errors import ChecksumError, FormatError, TruncatedError, UnknownFormatError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_archive import ArchiveWriter, read_archive

START, HEAD, END = 8, 84, 24


def archive(objects):
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    for key, data in objects:
        writer.add(key, data)
    writer.finish()
    return file.getvalue()


def objects(sizes=(0, 1, 5003, 17)):
    source = random.Random("archive")
    return [(PageKey(source.randbytes(32), source.randbytes(32)), source.randbytes(size)) for size in sizes]


def read(data):
    return list(read_archive(io.BytesIO(data)))


@pytest.mark.parametrize("sizes", [(), (0,), (0, 1, 5003, 17)])
def test_what_was_written_comes_back(sizes):
    assert [(page.key, page.data) for page in read(archive(objects(sizes)))] == objects(sizes)
    assert not any(page.is_damaged for page in read(archive(objects(sizes))))


def test_the_size_is_what_the_format_says():
    assert len(archive(objects())) == START + sum(HEAD + len(data) for _, data in objects()) + END


def test_cut_anywhere():
    data = archive(objects((3, 10)))
    for stop in range(len(data)):
        with pytest.raises(TruncatedError):
            read(data[:stop])


def test_any_changed_byte_is_noticed():
    """In an object it costs that object alone, elsewhere the archive from there on."""
    data = archive(objects((3, 10, 5)))
    first = START + HEAD
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x40
        if first <= position < first + 3:
            assert [page.is_damaged for page in read(bytes(changed))] == [True, False, False]
        elif not any(
            start <= position < start + size
            for start, size in ((first + 3 + HEAD, 10), (first + 3 + HEAD + 10 + HEAD, 5))
        ):
            with pytest.raises(FormatError):
                read(bytes(changed))


def test_what_follows_the_end():
    with pytest.raises(FormatError, match="follows"):
        read(archive(objects()) + b"x")


def test_another_version_and_another_file():
    data = archive(objects())
    for start in (b"KVPA" + struct.pack("<HH", 2, 0), b"PK\3\4\0\0\0\0", b"KVPA" + struct.pack("<HH", 1, 1)):
        with pytest.raises(UnknownFormatError):
            read(start + data[START:])


def test_a_page_that_was_taken_out_is_missed():
    data = archive(objects((3, 10)))
    without_first = data[:START] + data[START + HEAD + 3 :]
    with pytest.raises(TruncatedError, match="1 pages of 10 bytes, where there were 2 of 13"):
        read(without_first)


def test_a_length_that_no_object_has():
    """Nothing is allocated for it."""
    head = struct.pack("<4s64sQI", b"PAGE", bytes(64), 1 << 40, 0)
    data = archive([])[:START] + head + struct.pack("<I", zlib.crc32(head))
    with pytest.raises(FormatError, match="an object of 1099511627776 bytes"):
        read(data)


def test_a_damaged_head_says_so():
    data = bytearray(archive(objects((3,))))
    data[START + 10] ^= 1
    with pytest.raises(ChecksumError):
        read(bytes(data))
