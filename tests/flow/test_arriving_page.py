import dataclasses

import pytest
from flow_kit import GROUPED, NAMESPACE, SMALL

from sglang_kvcodec.errors import (
    ArrivalError,
    ChecksumError,
    ForeignPageError,
    KVCodecError,
    PeerRejectedError,
    TruncatedError,
    UnknownFormatError,
)
from sglang_kvcodec.flow.arriving_page import ArrivingPage, when_all_landed
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, read_header
from sglang_kvcodec.format.spec import KVDtype, Side
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


GROUP_STOPS = [stop for _, stop in read_header(DATA).group_ranges]


def begin(data=DATA, key=KEY, spec=GROUPED, profile="raw", header=None):
    page = ArrivingPage(key, PageTransforms(spec, profile))
    page.begin(header or header_of(data))
    return page


class Told:
    """What is told of the layer groups of a page."""

    def __init__(self, page):
        self.of = {}
        for group in range(len(GROUP_STOPS)):
            page.when_landed(group, lambda error, group=group: self.add(group, error))

    def add(self, group, error):
        assert group not in self.of
        self.of[group] = error


@pytest.mark.parametrize("fragment_bytes", [1009, 70_001, len(DATA)])
def test_fragments_of_any_size_become_the_page(fragment_bytes):
    page = begin()
    told = Told(page)
    for start in range(HEADER_BYTES, len(DATA), fragment_bytes):
        assert not page.is_whole
        page.add(FetchedFragment(0, start, DATA[start : start + fragment_bytes]))
        filled = min(len(DATA), start + fragment_bytes)
        assert list(told.of) == [group for group, stop in enumerate(GROUP_STOPS) if stop <= filled]
    assert page.is_whole
    assert set(told.of.values()) == {None}
    assert same_bits(PAGES.decode(page), PAGES.values("page"))


def test_a_layer_group_can_be_read_when_it_has_landed():
    page = begin()
    page.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES : GROUP_STOPS[0] + 1]))
    early = page.side_data(0, Side.KEY)
    page.add(FetchedFragment(0, GROUP_STOPS[0] + 1, DATA[GROUP_STOPS[0] + 1 :]))
    assert early == page.side_data(0, Side.KEY) == PageObject(DATA).side_data(0, Side.KEY)


def test_its_size_is_a_guess_until_its_header_comes():
    page = ArrivingPage(KEY, TRANSFORMS, 12)
    assert (len(page), page.key, page.is_whole) == (12, KEY, False)
    page.begin(header_of(DATA))
    assert len(page) == len(DATA)


def test_what_never_lands_is_told_once_and_what_landed_stays():
    page = begin()
    told = Told(page)
    page.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES : GROUP_STOPS[0]]))
    error = ArrivalError("gone")
    page.fail(error)
    page.fail(ArrivalError("again"))
    assert told.of == {0: None, 1: error, 2: error}
    late = Told(page)
    assert late.of == told.of


def test_pages_land_together_or_fail_together():
    for failing in (None, 0, 2):
        pages = [begin() for _ in range(3)]
        told = []
        when_all_landed([pages[0], PageObject(DATA), *pages[1:]], 1, told.append)
        for index, page in enumerate(pages):
            assert told == []
            if index == failing:
                page.fail(ArrivalError("gone"))
                break
            page.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES : GROUP_STOPS[1]]))
        assert [type(error) for error in told] == [type(None) if failing is None else ArrivalError]
        for page in pages:
            page.fail(ArrivalError("gone as well"))
        assert len(told) == 1
    told = []
    when_all_landed([PageObject(DATA)], 2, told.append)
    assert told == [None]


def test_a_page_that_starts_anew_at_another_peer_goes_on_where_it_was():
    page = begin()
    told = Told(page)
    half = (HEADER_BYTES + len(DATA)) // 2
    page.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES:half]))
    view = page.side_data(0, Side.KEY)
    page.begin(header_of(DATA))
    for start in range(HEADER_BYTES, len(DATA), 5003):
        page.add(FetchedFragment(0, start, DATA[start : start + 5003]))
    assert page.is_whole
    assert set(told.of.values()) == {None}
    assert view == page.side_data(0, Side.KEY)
    assert same_bits(PAGES.decode(page), PAGES.values("page"))


def test_a_page_that_comes_again_in_another_coding_is_refused():
    page = begin()
    changed = bytearray(DATA[:HEADER_BYTES])
    changed[-1] ^= 1
    with pytest.raises(PeerRejectedError):
        page.begin(FetchedHeader(0, len(DATA), bytes(changed)))


def test_bytes_before_the_header_are_refused():
    with pytest.raises(PeerRejectedError):
        ArrivingPage(KEY, TRANSFORMS).add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES:]))


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
        begin(header=header_of(DATA, len(DATA) + lie))


def test_a_header_with_payload_behind_it_is_refused():
    with pytest.raises(TruncatedError):
        begin(header=FetchedHeader(0, len(DATA), DATA[: HEADER_BYTES + 1]))


@pytest.mark.parametrize("length", [0, 3, 16, HEADER_BYTES - 1])
def test_a_cut_header_is_refused(length):
    with pytest.raises(TruncatedError):
        begin(header=FetchedHeader(0, len(DATA), DATA[:length]))


@pytest.mark.parametrize(
    ("position", "error"),
    [(0, UnknownFormatError), (4, UnknownFormatError), (12, ChecksumError), (HEADER_BYTES - 1, ChecksumError)],
    ids=["magic", "version", "crc", "manifest"],
)
def test_a_damaged_header_is_refused(position, error):
    damaged = bytearray(DATA[:HEADER_BYTES])
    damaged[position] ^= 0x40
    with pytest.raises(error):
        begin(header=FetchedHeader(0, len(DATA), bytes(damaged)))


@pytest.mark.parametrize("position", [HEADER_BYTES, (HEADER_BYTES + len(DATA)) // 2, len(DATA) - 1])
def test_a_flipped_bit_is_refused(position):
    damaged = bytearray(DATA)
    damaged[position] ^= 1
    page = begin()
    with pytest.raises(ChecksumError):
        page.add(FetchedFragment(0, HEADER_BYTES, bytes(damaged[HEADER_BYTES:])))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(HEADER_BYTES + 200, 10), (HEADER_BYTES + 50, 100), (0, 10), (HEADER_BYTES + 100, len(DATA))],
    ids=["gap", "overlap", "header again", "beyond the end"],
)
def test_fragments_out_of_order_are_the_peers_fault_not_the_pages(offset, length):
    page = begin()
    page.add(FetchedFragment(0, HEADER_BYTES, DATA[HEADER_BYTES : HEADER_BYTES + 100]))
    with pytest.raises(PeerRejectedError):
        page.add(FetchedFragment(0, offset, bytes(length)))


def test_every_refusal_has_a_reason_for_the_metrics():
    with pytest.raises(KVCodecError) as caught:
        begin(profile="exact")
    assert caught.value.reason == "foreign_page"
