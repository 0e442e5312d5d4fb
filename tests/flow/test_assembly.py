import dataclasses

import pytest
from flow_kit import GROUPED, NAMESPACE, SMALL

from sglang_kvcodec.errors import (
    ChecksumError,
    ForeignPageError,
    KVCodecError,
    PeerRejectedError,
    TruncatedError,
    UnknownFormatError,
)
from sglang_kvcodec.flow.assembly import PageAssembly
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import read_header
from sglang_kvcodec.format.spec import KVDtype
from sglang_kvcodec.testing.kv_pool import same_bits
from sglang_kvcodec.testing.pages import Pages, hash_of
from sglang_kvcodec.transform import PageTransforms

PAGES = Pages(GROUPED, "raw", NAMESPACE)
DATA = PAGES.coded("page")
HEADER_BYTES = read_header(DATA).header_bytes
KEY = PageKey(NAMESPACE, hash_of("page"))
TRANSFORMS = PageTransforms(GROUPED, "raw")


def header_of(data, object_bytes=None):
    size = read_header(data).header_bytes
    return FetchedHeader(0, len(data) if object_bytes is None else object_bytes, data[:size])


def begin(data=DATA, key=KEY, spec=GROUPED, profile="raw"):
    return PageAssembly(key, PageTransforms(spec, profile), header_of(data))


@pytest.mark.parametrize("fragment_bytes", [1009, 70_001, len(DATA)])
def test_fragments_of_any_size_become_the_page(fragment_bytes):
    assembly = begin()
    page = assembly.finish()
    for start in range(HEADER_BYTES, len(DATA), fragment_bytes):
        assert page is None
        page = assembly.add(FetchedFragment(0, start, DATA[start : start + fragment_bytes]))
    assert page is not None
    assert same_bits(PAGES.decode(page), PAGES.values("page"))


@pytest.mark.parametrize(
    "foreign",
    [
        {"key": PageKey(NAMESPACE, hash_of("other"))},
        {"key": PageKey(bytes(32), hash_of("page"))},
        {"spec": dataclasses.replace(GROUPED, layers=6)},
        {"spec": dataclasses.replace(GROUPED, dtype=KVDtype.FLOAT16)},
        {"spec": SMALL},
        {"profile": "exact"},
    ],
    ids=["hash", "namespace", "layers", "dtype", "spec", "profile"],
)
def test_another_page_than_asked_for_is_refused_at_its_header(foreign):
    with pytest.raises(ForeignPageError):
        begin(**foreign)


@pytest.mark.parametrize("lie", [-1, 1, 1 << 20])
def test_a_size_that_is_not_the_pages_is_refused(lie):
    with pytest.raises(TruncatedError):
        PageAssembly(KEY, TRANSFORMS, header_of(DATA, len(DATA) + lie))


def test_a_header_with_payload_behind_it_is_refused():
    with pytest.raises(TruncatedError):
        PageAssembly(KEY, TRANSFORMS, FetchedHeader(0, len(DATA), DATA[: HEADER_BYTES + 1]))


@pytest.mark.parametrize("length", [0, 3, 16, HEADER_BYTES - 1])
def test_a_cut_header_is_refused(length):
    with pytest.raises(TruncatedError):
        PageAssembly(KEY, TRANSFORMS, FetchedHeader(0, len(DATA), DATA[:length]))


@pytest.mark.parametrize(
    ("position", "error"),
    [(0, UnknownFormatError), (4, UnknownFormatError), (12, ChecksumError), (HEADER_BYTES - 1, ChecksumError)],
    ids=["magic", "version", "crc", "manifest"],
)
def test_a_damaged_header_is_refused(position, error):
    damaged = bytearray(DATA[:HEADER_BYTES])
    damaged[position] ^= 0x40
    with pytest.raises(error):
        PageAssembly(KEY, TRANSFORMS, FetchedHeader(0, len(DATA), bytes(damaged)))


@pytest.mark.parametrize("position", [HEADER_BYTES, (HEADER_BYTES + len(DATA)) // 2, len(DATA) - 1])
def test_a_flipped_bit_is_refused(position):
    damaged = bytearray(DATA)
    damaged[position] ^= 1
    assembly = begin()
    with pytest.raises(ChecksumError):
        assembly.add(FetchedFragment(0, HEADER_BYTES, bytes(damaged[HEADER_BYTES:])))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(HEADER_BYTES + 200, 10), (HEADER_BYTES + 50, 100), (0, 10), (HEADER_BYTES + 100, len(DATA))],
    ids=["gap", "overlap", "header again", "beyond the end"],
)
def test_fragments_out_of_order_are_the_peers_fault_not_the_pages(offset, length):
    assembly = begin()
    assert assembly.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES : HEADER_BYTES + 100])) is None
    with pytest.raises(PeerRejectedError):
        assembly.add(FetchedFragment(0, offset, bytes(length)))


def test_every_refusal_has_a_reason_for_the_metrics():
    with pytest.raises(KVCodecError) as caught:
        begin(profile="exact")
    assert caught.value.reason == "foreign_page"
