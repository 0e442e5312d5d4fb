import json
import threading

import pytest
import torch
from flow_kit import GROUPED, LIMIT_S, NAMESPACE, SMALL, counted, wait_until

from sglang_kvcodec.errors import (
    ArrivalError,
    ChecksumError,
    CodecError,
    FormatError,
    KVCodecError,
    RestoreTimeoutError,
)
from sglang_kvcodec.flow import restorer as restorer_module
from sglang_kvcodec.flow.arriving_page import ArrivingPage
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.flow.restore import Restore, RestoreJob
from sglang_kvcodec.flow.restore_meter import RestoreMeter
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.flow.trace import FileTracer
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, PicturePart, SideData, build_page_object, read_header
from sglang_kvcodec.format.profile import Coding
from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.testing.calibrations import random_calibration
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.pages import Pages, hash_of, new_decoder
from sglang_kvcodec.testing.synthetic import page_values
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

GROUPS = layer_groups(GROUPED)


class Outcome:
    """What a restore calls back."""

    def __init__(self):
        self.calls = []
        self.events = []
        self._ended = threading.Event()

    def on_layers(self, group, events):
        self.events.append(events)
        self.calls.append(group.index)
        if group == GROUPS[-1] or group.layers == SMALL.layers:
            self._ended.set()

    def on_failure(self, error):
        self.calls.append(error)
        self._ended.set()

    def wait(self):
        assert self._ended.wait(LIMIT_S)
        return self.calls


class ScriptedDecoder:
    """A decoder that calls ``before(pages, group_index, side)`` first."""

    def __init__(self, inner, before):
        self._inner, self._before = inner, before
        self.restore, self.device = inner.restore, inner.device

    def unpack(self, pages, group_index, side):
        self._before(pages, group_index, side)
        return self._inner.unpack(pages, group_index, side)

    def decode(self, pages, group_index, side):
        return self.restore(pages, self.unpack(pages, group_index, side), group_index, side)


@pytest.fixture(scope="module")
def exact():
    return Pages(GROUPED, "exact", NAMESPACE)


@pytest.fixture(scope="module")
def exact_pages(exact):
    """Coded once: an HEVC encoder is slow."""
    return [exact.page(name) for name in range(3)]


@pytest.fixture
def start(closing):
    """Starts a restore of ``jobs`` = [(page objects, page numbers in the pool)]."""

    def run(pool, profile, jobs, threads=2, before=lambda *args: None):
        def open_decoder():
            return ScriptedDecoder(new_decoder(pool.spec, profile), before)

        restorer = Restorer(pool.wrapped, open_decoder, threads)
        closing.callback(restorer.close)
        outcome = Outcome()
        outcome.close = restorer.close
        restore = restorer.start(
            [RestoreJob(objects, pool.slots(numbers)) for objects, numbers in jobs],
            outcome.on_layers,
            outcome.on_failure,
        )
        return restore, outcome

    return run


def test_bit_exact_at_scattered_slots_through_pictures(start, exact, exact_pages, delta):
    pool = KnownPool(GROUPED, 4)
    before = pool.bits()
    _, outcome = start(pool, "exact", [(exact_pages, [2, 0, 3])])
    assert outcome.wait() == [0, 1, 2]
    for name, number in enumerate([2, 0, 3]):
        assert same_bits(pool.page(number), exact.values(name))
    assert pool.others_are(before, [2, 0, 3])
    assert delta("kvcodec_restored_tokens_total", tier="exact") == 3 * GROUPED.page_tokens
    assert delta("kvcodec_restored_bytes_total", tier="exact") == 3 * GROUPED.page_bytes


@pytest.mark.parametrize("threads", [1, 3])
def test_several_jobs_of_more_pages_than_a_segment(start, delta, threads, monkeypatch):
    monkeypatch.setattr(restorer_module, "SEGMENT_PAGES", 2)
    pages = Pages(SMALL, "raw", NAMESPACE)
    pool = KnownPool(SMALL, 10)
    before = pool.bits()
    objects = [pages.page(name) for name in range(8)]
    decoded = []
    _, outcome = start(
        pool,
        "raw",
        [(objects[:5], [9, 1, 4, 0, 7]), (objects[5:6], [3]), (objects[6:], [8, 2])],
        threads,
        lambda segment, group, side: decoded.append((len(segment), side)),
    )
    assert outcome.wait() == [0]
    for name, number in enumerate([9, 1, 4, 0, 7, 3, 8, 2]):
        assert same_bits(pool.page(number), pages.values(name))
    assert pool.others_are(before, [9, 1, 4, 0, 7, 3, 8, 2])
    assert sorted(size for size, _ in decoded) == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert delta("kvcodec_restored_tokens_total", tier="raw") == 8 * SMALL.page_tokens


def test_parts_are_measured_and_traced(closing, tmp_path, monkeypatch):
    monkeypatch.setattr(restorer_module, "SEGMENT_PAGES", 2)
    pages = Pages(GROUPED, "raw", NAMESPACE)
    objects = [pages.page(name) for name in range(3)]
    pool = KnownPool(GROUPED, 3)
    meter = RestoreMeter(3, 2, 2, 2)
    idle = threading.Event()
    meter.on_idle = idle.set
    tracer = FileTracer(tmp_path / "t.json", "a server")
    restorer = Restorer(pool.wrapped, lambda: new_decoder(GROUPED, "raw"), 2, meter=meter, tracer=tracer)
    closing.callback(restorer.close)
    outcome = Outcome()
    restorer.start([RestoreJob(objects, pool.slots(range(3)))], outcome.on_layers, outcome.on_failure)
    assert outcome.wait() == [0, 1, 2]
    assert idle.wait(LIMIT_S)
    model = meter.model()
    assert model.queued_s == 0
    assert model.seconds(3, sum(map(len, objects))) > 0
    restorer.close()
    tracer.close()
    work = [event for event in json.loads((tmp_path / "t.json").read_text()) if event["ph"] == "X"]
    for name in ("decode", "restore"):
        args = [event["args"] for event in work if event["name"] == name]
        assert len(args) == 12
        assert {(each["group"], each["side"]) for each in args} == {(g, s) for g in range(3) for s in ("KEY", "VALUE")}
        assert sorted(each["pages"] for each in args) == [1] * 6 + [2] * 6


def test_layers_are_told_in_order_and_only_when_both_sides_are_written(start, gate):
    pages = Pages(GROUPED, "raw", NAMESPACE)
    pool = KnownPool(GROUPED, 1)
    told = []
    later_are_done = threading.Barrier(2)

    def before(segment, group_index, side):
        if (group_index, side) == (0, Side.VALUE):
            # The other thread writes all of the groups behind while this side of the first one is late.
            later_are_done.wait(LIMIT_S)
            told.extend(outcome.calls)
        if (group_index, side) == (2, Side.VALUE):
            later_are_done.wait(LIMIT_S)

    expected = pages.values("page")
    written = []
    outcome = Outcome()

    def on_layers(group, events):
        now = pool.page(0)
        layers = slice(group.first_layer, group.first_layer + group.layers)
        written.append(all(torch.equal(now[side][layers], expected[side][layers]) for side in GROUPED.sides))
        Outcome.on_layers(outcome, group, events)

    restorer = Restorer(pool.wrapped, lambda: ScriptedDecoder(new_decoder(GROUPED, "raw"), before), 2)
    restorer.start([RestoreJob([pages.page("page")], pool.slots([0]))], on_layers, outcome.on_failure)
    assert outcome.wait() == [0, 1, 2]
    restorer.close()
    assert told == []
    assert written == [True, True, True]


def spoiled(exact, name, group_index, side, spoil):
    """A page object with good CRCs whose picture in one place is not what was encoded."""
    good = exact.page(name)
    groups = [{each: good.side_data(group.index, each) for each in GROUPED.sides} for group in GROUPS]
    data = groups[group_index][side]
    groups[group_index][side] = SideData(spoil(data.picture), data.stored)
    key = PageKey(NAMESPACE, hash_of(name))
    return PageObject(build_page_object(key, GROUPED, "exact", groups, good.parameter_sets))


def wrong_digest(picture):
    return PicturePart(picture.data, picture.plane_digest ^ 1)


def junk(picture):
    return PicturePart(b"\x00\x00\x01\x28" + bytes(range(1, 200)), picture.plane_digest)


@pytest.mark.parametrize("spoil", [wrong_digest, junk])
def test_a_corrupt_picture_fails_once_after_the_last_write_and_names_its_page(start, exact, exact_pages, delta, spoil):
    bad = spoiled(exact, 1, 1, Side.VALUE, spoil)
    pool = KnownPool(GROUPED, 4)
    before = pool.bits()
    restore, outcome = start(pool, "exact", [([exact_pages[0], bad, exact_pages[2]], [3, 0, 1])])
    calls = outcome.wait()
    at_failure = pool.bits()
    assert isinstance(calls[-1], ChecksumError | CodecError)
    assert calls[:-1] in ([], [0])
    assert restore.bad_pages == [bad]
    assert restore.has_failed
    assert pool.others_are(before, [3, 0, 1])
    assert delta("kvcodec_restore_failures_total", reason=calls[-1].reason) == 1
    assert delta("kvcodec_restored_tokens_total", tier="exact") == 0
    # Nothing is written or told any more, whatever the threads still do.
    outcome.close()
    assert pool.others_are(at_failure, [])
    assert len(outcome.calls) == len(calls)


def test_the_failure_waits_for_a_write_under_way(start):
    pages = Pages(GROUPED, "raw", NAMESPACE)
    pool = KnownPool(GROUPED, 1)
    failed, order = threading.Event(), []

    def before(segment, group_index, side):
        if (group_index, side) == (0, Side.VALUE):
            failed.set()
            raise CodecError("no")
        if (group_index, side) == (0, Side.KEY):
            assert failed.wait(LIMIT_S)
            order.append("still decoding")

    _, outcome = start(pool, "raw", [([pages.page("page")], [0])], 2, before)
    calls = outcome.wait()
    assert order == ["still decoding"]
    assert same_bits({Side.KEY: pool.page(0)[Side.KEY][:3]}, {Side.KEY: pages.values("page")[Side.KEY][:3]})
    assert [type(call) for call in calls] == [CodecError]


def test_a_failure_that_no_single_page_causes_is_blamed_on_all(start):
    pages = Pages(SMALL, "raw", NAMESPACE)
    pool = KnownPool(SMALL, 3)

    def before(segment, group_index, side):
        if len(segment) > 1:
            raise CodecError("too many")

    objects = [pages.page(name) for name in range(3)]
    restore, outcome = start(pool, "raw", [(objects, [0, 1, 2])], 1, before)
    outcome.wait()
    assert restore.bad_pages == objects


def test_an_error_nobody_thought_of_is_a_failure_too(start, delta):
    pages = Pages(SMALL, "raw", NAMESPACE)
    restore, outcome = start(
        KnownPool(SMALL, 1), "raw", [([pages.page(0)], [0])], 2, lambda segment, group, side: 1 / 0
    )
    (error,) = outcome.wait()
    assert type(error) is KVCodecError
    assert len(restore.bad_pages) == 1
    assert delta("kvcodec_restore_failures_total", reason=error.reason) == 1


def test_the_next_restore_is_none_the_worse(closing):
    pages = Pages(SMALL, "raw", NAMESPACE)
    pool = KnownPool(SMALL, 2)
    fail = [True]

    def before(segment, group, side):
        if fail[0]:
            raise CodecError("no")

    restorer = Restorer(pool.wrapped, lambda: ScriptedDecoder(new_decoder(SMALL, "raw"), before), 2)
    closing.callback(restorer.close)
    first, second = Outcome(), Outcome()
    restorer.start([RestoreJob([pages.page(0)], pool.slots([0]))], first.on_layers, first.on_failure)
    first.wait()
    fail[0] = False
    restorer.start([RestoreJob([pages.page(1)], pool.slots([1]))], second.on_layers, second.on_failure)
    assert second.wait() == [0]
    assert same_bits(pool.page(1), pages.values(1))


def test_a_restore_that_takes_too_long_is_given_up_between_its_parts(closing, monkeypatch):
    pages = Pages(GROUPED, "raw", NAMESPACE)
    pool, passed_s, decoded = KnownPool(GROUPED, 2), [0.0], []
    monkeypatch.setattr(restorer_module.time, "monotonic", lambda: passed_s[0])

    def before(segment, group, side):
        decoded.append((group, side))
        passed_s[0] += 6.0

    restorer = Restorer(pool.wrapped, lambda: ScriptedDecoder(new_decoder(GROUPED, "raw"), before), 1, timeout_s=10.0)
    closing.callback(restorer.close)
    outcome = Outcome()
    restore = restorer.start([RestoreJob([pages.page(0)], pool.slots([0]))], outcome.on_layers, outcome.on_failure)
    error = outcome.wait()[-1]
    assert isinstance(error, RestoreTimeoutError)
    assert error.reason == "restore_timeout"
    assert decoded == [(0, Side.KEY), (0, Side.VALUE)]
    # Nothing is wrong with the page.
    assert restore.bad_pages == []


class Clock:
    """Of the restorer and its meter; each part takes ``part_s`` of it."""

    def __init__(self, monkeypatch):
        self.now_s, self.part_s = 0.0, 0.1
        monkeypatch.setattr(restorer_module.time, "monotonic", lambda: self.now_s)

    def part(self, segment, group, side):
        self.now_s += self.part_s


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def measured(closing, clock):
    """A restorer that knows how long parts take: 0.1 s."""
    meter = RestoreMeter(3, 2, 32, 1, lambda: clock.now_s)
    meter.on_idle = meter.model
    restorer = Restorer(
        (pool := KnownPool(GROUPED, 3)).wrapped,
        lambda: ScriptedDecoder(new_decoder(GROUPED, "raw"), clock.part),
        1,
        meter=meter,
    )
    closing.callback(restorer.close)
    page = Pages(GROUPED, "raw", NAMESPACE).page(0)
    for number in range(3):
        outcome = Outcome()
        restorer.start([RestoreJob([page], pool.slots([number]))], outcome.on_layers, outcome.on_failure)
        assert outcome.wait() == [0, 1, 2]
    return restorer, pool


def test_a_restore_that_takes_much_longer_than_expected_is_given_up(measured, clock):
    restorer, pool = measured
    pages = Pages(GROUPED, "raw", NAMESPACE)
    clock.part_s = restorer_module.LEAST_PATIENCE_S / 2 + 0.1
    outcome = Outcome()
    restore = restorer.start([RestoreJob([pages.page(1)], pool.slots([1]))], outcome.on_layers, outcome.on_failure)
    *layers, error = outcome.wait()
    assert isinstance(error, RestoreTimeoutError)
    assert layers == [0]
    assert restore.bad_pages == []


def test_pages_that_come_late_do_not_make_a_restore_take_long(measured, clock):
    restorer, pool = measured
    arriving = Arriving(Pages(GROUPED, "raw", NAMESPACE), range(1))
    outcome = Outcome()
    restorer.start([RestoreJob(arriving.pages, pool.slots([1]))], outcome.on_layers, outcome.on_failure)
    arriving.header(0)
    for group in range(3):
        clock.now_s += 2 * restorer_module.LEAST_PATIENCE_S
        arriving.group(0, group)
        wait_until(lambda done=list(range(group + 1)): outcome.calls == done)


def test_parts_that_wait_for_a_thread_are_counted(start, gate):
    pages = Pages(GROUPED, "raw", NAMESPACE)
    pool = KnownPool(GROUPED, 1)
    _, outcome = start(pool, "raw", [([pages.page(0)], [0])], 1, lambda *args: gate.wait(LIMIT_S))
    # Of three layer groups with two sides one is being decoded.
    wait_until(lambda: counted("kvcodec_queued_restore_parts") == 5)
    gate.set()
    assert outcome.wait() == [0, 1, 2]
    assert counted("kvcodec_queued_restore_parts") == 0


def test_what_nobody_waits_for_gives_way(closing, gate):
    pages, pool = Pages(GROUPED, "raw", NAMESPACE), KnownPool(GROUPED, 3)
    began, decoded = threading.Event(), []

    def before(decoding, group_index, side):
        began.set()
        gate.wait(LIMIT_S)
        decoded.append(decoding[0].key.page_hash)

    restorer = Restorer(pool.wrapped, lambda: ScriptedDecoder(new_decoder(GROUPED, "raw"), before), 1)
    closing.callback(restorer.close)
    outcomes = []
    for name, is_awaited in ((0, False), (1, False), (2, True)):
        outcomes.append(Outcome())
        job = RestoreJob([pages.page(name)], pool.slots([name]))
        restorer.start([job], outcomes[-1].on_layers, outcomes[-1].on_failure, is_awaited=is_awaited)
        assert began.wait(LIMIT_S)
    gate.set()
    for outcome in outcomes:
        assert outcome.wait() == [0, 1, 2]
    # All but the part that was under way when it came. Three layer groups with two sides each.
    expected = [hash_of(0), *[hash_of(2)] * 6, *[hash_of(0)] * 5, *[hash_of(1)] * 6]
    assert decoded == expected


class KernelInName:
    """Restores as the reference does, into the layers it is given."""

    def __init__(self, transform):
        self._transform = transform
        self.layers = []
        self.pages = 0

    def restore(self, group, side, packed, first_positions, slots, buffers, planes=None):
        assert planes is None
        self.layers.append(len(buffers))
        self.pages += len(packed)
        values = self._transform.restore(group, side, packed, first_positions)
        for index, buffer in enumerate(buffers):
            buffer[slots] = values[:, index].flatten(0, 1)


class KernelsInName:
    """One for each coding that pages have."""

    def __init__(self, transforms):
        self._transforms = transforms
        self.opened = {}

    def get(self, profile_name, calibration_digest=b""):
        coding = profile_name, calibration_digest
        return self.opened.setdefault(coding, KernelInName(self._transforms.get(*coding)))


def test_with_a_kernel_the_same_pages_come_into_the_same_layers(exact, exact_pages, closing):
    pool, kernels = KnownPool(GROUPED, 4), KernelsInName(PageTransforms(GROUPED, "exact"))
    before = pool.bits()
    restorer = Restorer(pool.wrapped, lambda: new_decoder(GROUPED, "exact"), 2, kernels)
    closing.callback(restorer.close)
    outcome = Outcome()
    restorer.start([RestoreJob(exact_pages, pool.slots([2, 0, 3]))], outcome.on_layers, outcome.on_failure)
    assert outcome.wait() == [0, 1, 2]
    for name, number in enumerate([2, 0, 3]):
        assert same_bits(pool.page(number), exact.values(name))
    assert pool.others_are(before, [2, 0, 3])
    assert sorted(kernels.get("exact").layers) == [1, 1, 3, 3, 3, 3]


def test_a_page_that_the_kernel_refuses_is_found(exact_pages, closing):
    header = exact_pages[1].header
    groups = [{side: exact_pages[1].side_data(group.index, side) for side in GROUPED.sides} for group in GROUPS]
    short = groups[1][Side.VALUE]
    groups[1][Side.VALUE] = SideData(short.picture, short.stored[:-1], short.escapes)
    sets = exact_pages[1].parameter_sets
    bad = PageObject(build_page_object(header.key, GROUPED, "exact", groups, sets))
    pool = KnownPool(GROUPED, 4)
    kernels = KernelsInName(PageTransforms(GROUPED, "exact"))
    restorer = Restorer(pool.wrapped, lambda: new_decoder(GROUPED, "exact"), 2, kernels)
    closing.callback(restorer.close)
    outcome = Outcome()
    job = RestoreJob([exact_pages[0], bad, exact_pages[2]], pool.slots([2, 0, 3]))
    restore = restorer.start([job], outcome.on_layers, outcome.on_failure)
    assert isinstance(outcome.wait()[-1], FormatError)
    assert restore.bad_pages == [bad]


def test_each_page_of_a_segment_is_restored_by_the_kernel_of_its_coding(closing):
    calibration = random_calibration(GROUPED, step=0.01)
    transforms = PageTransforms(GROUPED, "high", [calibration])
    values = {name: page_values(GROUPED, seed) for seed, name in enumerate(["plain", "calibrated", "not finite"])}
    values["not finite"][Side.KEY][4, 1, 2, 3] = float("inf")
    plain = PageEncoder(NAMESPACE, transforms, open_encoder())
    calibrated = PageEncoder(NAMESPACE, transforms, open_encoder(), transforms.codings(calibration.digest)[0])
    pages = {
        name: PageObject((plain if name == "plain" else calibrated).encode(hash_of(name), page, 0))
        for name, page in values.items()
    }
    assert [pages[name].header.profile_name for name in pages] == ["high", "high", "exact"]
    pool, kernels = KnownPool(GROUPED, 4), KernelsInName(transforms)
    restorer = Restorer(pool.wrapped, lambda: GroupDecoder(transforms, open_decoder()), 2, kernels)
    closing.callback(restorer.close)
    sides = len(GROUPS) * len(GROUPED.sides)
    for names in [["plain"], ["calibrated"], ["not finite"], ["not finite", "calibrated"], list(pages)]:
        kernels.opened.clear()
        outcome = Outcome()
        job = RestoreJob([pages[name] for name in names], pool.slots(range(len(names))))
        restorer.start([job], outcome.on_layers, outcome.on_failure)
        assert outcome.wait() == [0, 1, 2]
        codings = [(pages[name].header.profile_name, pages[name].header.calibration_digest) for name in names]
        assert {coding: kernel.pages for coding, kernel in kernels.opened.items()} == dict.fromkeys(codings, sides)
    assert same_bits(pool.page(2), values["not finite"])
    for number, name in enumerate(["plain", "calibrated"]):
        for side in GROUPED.sides:
            error = pool.page(number)[side].float() - values[name][side].float()
            assert float(error.abs().max()) < 0.2


@pytest.mark.parametrize("has_kernels", [False, True])
def test_pages_that_are_not_coded_are_restored_beside_pages_that_are(has_kernels, exact_pages, closing, delta):
    transforms = PageTransforms(GROUPED, ("raw", "exact"))
    raw = Pages(GROUPED, "raw", NAMESPACE)
    pages = [exact_pages[0], raw.page(1), exact_pages[2]]
    pool, kernels = KnownPool(GROUPED, 4), KernelsInName(transforms)
    before = pool.bits()
    restorer = Restorer(
        pool.wrapped, lambda: GroupDecoder(transforms, open_decoder()), 2, kernels if has_kernels else None
    )
    closing.callback(restorer.close)
    outcome = Outcome()
    restorer.start([RestoreJob(pages, pool.slots([3, 0, 2]))], outcome.on_layers, outcome.on_failure)
    assert outcome.wait() == [0, 1, 2]
    for name, number in enumerate([3, 0, 2]):
        assert same_bits(pool.page(number), raw.values(name))
    assert pool.others_are(before, [3, 0, 2])
    for tier, count in (("raw", 1), ("exact", 2)):
        assert delta("kvcodec_restored_tokens_total", tier=tier) == count * GROUPED.page_tokens
        assert delta("kvcodec_restored_bytes_total", tier=tier) == count * GROUPED.page_bytes
    assert {coding.profile_name for coding in map(Coding._make, kernels.opened)} == (
        {"exact"} if has_kernels else set()
    )


class BrokenEvent:
    def synchronize(self):
        raise RuntimeError("the device is gone")


def test_a_failure_is_told_though_the_device_is_gone():
    outcome = Outcome()
    restore = Restore([], GROUPED, 2, outcome.on_layers, outcome.on_failure)
    restore.queued(0, BrokenEvent())
    for group in GROUPS:
        for _ in range(2):
            restore.part_done(group.index, CodecError("no"))
    assert [type(call) for call in outcome.wait()] == [CodecError]


def test_layers_are_told_with_the_events_of_all_their_parts():
    outcome = Outcome()
    restore = Restore([], GROUPED, 2, outcome.on_layers, outcome.on_failure)
    restore.queued(1, "k1")
    restore.queued(0, "v0")
    restore.part_done(1, None)
    restore.part_done(0, None)
    restore.queued(1, "v1")
    restore.part_done(1, None)
    assert outcome.calls == []
    restore.queued(0, "k0")
    restore.part_done(0, None)
    assert outcome.calls == [0, 1]
    assert outcome.events == [["v0", "k0"], ["k1", "v1"]]


class Arriving:
    """Pages whose layer groups arrive when they are told to."""

    def __init__(self, pages, names):
        self._objects = [pages.coded(name) for name in names]
        transforms = PageTransforms(pages.spec, pages.profile)
        self.pages = [ArrivingPage(PageKey(NAMESPACE, hash_of(name)), transforms) for name in names]

    def header(self, index):
        data = self._objects[index]
        size = read_header(data).header_bytes
        self.pages[index].begin(FetchedHeader(0, len(data), data[:size]))

    def group(self, index, group):
        data = self._objects[index]
        start, stop = read_header(data).group_ranges[group]
        self.pages[index].add(FetchedFragment(0, start, data[start:stop]))


def test_parts_are_restored_as_they_land(start, exact, exact_pages, monkeypatch, delta):
    monkeypatch.setattr(restorer_module, "SEGMENT_PAGES", 2)
    arriving = Arriving(exact, range(3))
    pool = KnownPool(GROUPED, 4)
    before = pool.bits()
    decoded = []
    _, outcome = start(
        pool,
        "exact",
        [(arriving.pages, [2, 0, 3]), ([exact_pages[0]], [1])],
        2,
        lambda segment, group, side: decoded.append((group, len(segment), side)),
    )
    # The third page is a segment of its own, and the first to be there.
    arriving.header(2)
    for group in range(3):
        arriving.group(2, group)
    for index in (1, 0):
        arriving.header(index)
    assert outcome.calls == []
    for group in range(3):
        assert outcome.calls == [] or outcome.calls[-1] < group
        for index in (1, 0):
            arriving.group(index, group)
    assert outcome.wait() == [0, 1, 2]
    assert sorted(size for _, size, _ in decoded) == [1] * 12 + [2] * 6
    for name, number in enumerate([2, 0, 3]):
        assert same_bits(pool.page(number), exact.values(name))
    assert same_bits(pool.page(1), exact.values(0))
    assert pool.others_are(before, [0, 1, 2, 3])
    assert delta("kvcodec_restored_tokens_total", tier="exact") == 4 * GROUPED.page_tokens


def test_a_page_that_never_lands_fails_the_restore_once_and_blames_no_page(start, exact, delta):
    arriving = Arriving(exact, range(2))
    pool = KnownPool(GROUPED, 3)
    before = pool.bits()
    restore, outcome = start(pool, "exact", [(arriving.pages, [2, 0])])
    for index in range(2):
        arriving.header(index)
        arriving.group(index, 0)
    for page in arriving.pages:
        page.fail(ArrivalError("the peer is gone"))
    calls = outcome.wait()
    assert isinstance(calls[-1], ArrivalError)
    assert calls[:-1] in ([], [0])
    assert restore.bad_pages == []
    assert pool.others_are(before, [2, 0])
    assert delta("kvcodec_restore_failures_total", reason="arrival") == 1


def test_what_lands_after_the_threads_have_ended_is_a_failure(closing, exact):
    arriving = Arriving(exact, range(1))
    pool = KnownPool(GROUPED, 1)
    restorer = Restorer(pool.wrapped, lambda: new_decoder(GROUPED, "exact"), 1)
    outcome = Outcome()
    restorer.start([RestoreJob(arriving.pages, pool.slots([0]))], outcome.on_layers, outcome.on_failure)
    restorer.close()
    arriving.header(0)
    for group in range(3):
        arriving.group(0, group)
    (error,) = outcome.wait()
    assert isinstance(error, ArrivalError)


def test_a_size_that_was_guessed_leaves_nothing_queued(closing, exact):
    arriving = Arriving(exact, range(1))
    pool = KnownPool(GROUPED, 1)
    meter = RestoreMeter(3, 2, 32, 1)
    idle = threading.Event()
    meter.on_idle = idle.set
    restorer = Restorer(pool.wrapped, lambda: new_decoder(GROUPED, "exact"), 1, meter=meter)
    closing.callback(restorer.close)
    outcome = Outcome()
    restorer.start([RestoreJob(arriving.pages, pool.slots([0]))], outcome.on_layers, outcome.on_failure)
    arriving.header(0)
    for group in range(3):
        arriving.group(0, group)
    assert outcome.wait() == [0, 1, 2]
    assert idle.wait(LIMIT_S)
    assert meter.model().queued_s == 0
