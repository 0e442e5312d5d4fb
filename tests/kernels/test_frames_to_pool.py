"""The restorer on planes that lie where a decoder left them: decode, digest, restore, event, one after the other.

In the interpreter with a stand-in for PyNvVideoCodec, whose buffers the next call fills again; on a GPU with NVDEC.
"""

import contextlib
import threading

import pytest
import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import ChecksumError, CodecError, FormatError
from sglang_kvcodec.flow import restorer as restorer_module
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.flow.restore import RestoreJob
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.flow.streams import stream_of
from sglang_kvcodec.format.page_object import PageObject, PicturePart, SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import PageRestores
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.rehearsal import RehearsalDriver, RehearsalLibrary
from sglang_kvcodec.testing.rehearsal_streams import RehearsalStreams
from sglang_kvcodec.testing.synthetic import page_values
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder
from sglang_kvcodec.video.cuda_driver import CudaDriver
from sglang_kvcodec.video.nvdec import NvdecDecoder
from sglang_kvcodec.video.nvidia import load_library

# NumPy, which interprets the kernels, warns where a sum wraps around, and where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SPEC = KVSpec(layers=4, kv_heads=3, head_dim=128, page_tokens=43, dtype=KVDtype.BFLOAT16)
"""Two layer groups, of three layers and of one; pictures of 192 x 192, the same for all codings."""
GROUPS = layer_groups(SPEC)
CALIBRATION = random_calibration(SPEC, layers_per_block=1, step=0.2, rope=neox_rope(128))
LIMIT_S = 100


class Rig:
    """A pool on the device, decoders that leave planes there, and what a restore calls back."""

    def __init__(self, engine, transforms, pages):
        self.device = torch.device("cuda", 0) if engine == "cuda" else torch.device("cpu")
        self.known = KnownPool(SPEC, pages)
        self.before = self.known.bits()
        # In the middle of other memory, so that whatever is written beside the pool is seen.
        self._whole = {
            side: torch.cat([torch.stack(layers)] * 3, dim=1).to(self.device, copy=True)
            for side, layers in self.known.buffers.items()
        }
        slots = len(self.known.buffers[Side.KEY][0])
        self._layers = {side: [layer[slots : 2 * slots] for layer in whole] for side, whole in self._whole.items()}
        self.transforms = transforms
        self.streams = RehearsalStreams() if engine == "cpu" else None
        pool = PagedKVPool(SPEC, lambda: self._layers, self.device, self.streams or stream_of)
        self.library = RehearsalLibrary(pitch_padding=64) if engine == "cpu" else load_library()
        self.driver = RehearsalDriver() if engine == "cpu" else CudaDriver(0)
        self.decoders = []
        self.wrap = lambda decoder: decoder
        self.restorer = Restorer(pool, self._new_decoder, 2, PageRestores(transforms, self.device))

    def _new_decoder(self):
        self.decoders.append(NvdecDecoder(self.library, self.driver))
        return self.wrap(GroupDecoder(self.transforms, self.decoders[-1]))

    def start(self, jobs, after=()):
        """Restores [(page objects, page numbers)]; gives the restore and what was called back, once it has ended."""
        calls, ended = [], threading.Event()

        def on_layers(group, events):
            calls.append((group.index, list(events)))
            if group == GROUPS[-1]:
                ended.set()

        def on_failure(error):
            calls.append(error)
            ended.set()

        jobs = [RestoreJob(objects, self.known.slots(numbers).to(self.device)) for objects, numbers in jobs]
        restore = self.restorer.start(jobs, on_layers, on_failure, after)
        assert ended.wait(LIMIT_S)
        for _, events in (call for call in calls if isinstance(call, tuple)):
            for event in events:
                event.synchronize()
        for side, whole in self._whole.items():
            slots = len(self.known.buffers[side][0])
            expected = torch.stack([layer.view(torch.int16) for layer in self.known.buffers[side]])
            # The pool is read back; what lies around it is as it was.
            around = whole.cpu().view(torch.int16)
            assert torch.equal(around[:, :slots], self._originals[side])
            assert torch.equal(around[:, 2 * slots :], self._originals[side])
            expected.copy_(around[:, slots : 2 * slots])
            for layer, bits in zip(self.known.buffers[side], expected, strict=True):
                layer.view(torch.int16).copy_(bits)
        return restore, calls

    @property
    def _originals(self):
        if not hasattr(self, "_kept"):
            self._kept = {
                side: bits.view(torch.int16).view(SPEC.layers, -1, SPEC.kv_heads, SPEC.head_dim)
                for side, bits in self.before.items()
            }
        return self._kept

    def close(self):
        self.restorer.close()
        for decoder in self.decoders:
            decoder.close()


@pytest.fixture(scope="module")
def transforms():
    return PageTransforms(SPEC, "high", [CALIBRATION])


@pytest.fixture(scope="module")
def coded(transforms):
    """Page objects of each coding: plain ``high``, calibrated, and ``exact`` for values that a tier can't code."""
    values = [page_values(SPEC, seed) for seed in range(5)]
    values[4][Side.KEY][2, 1, 1, 3] = float("inf")
    plain = PageEncoder(bytes(32), transforms, open_encoder())
    coding = transforms.codings(CALIBRATION.digest)[0]
    calibrated = PageEncoder(bytes(32), transforms, open_encoder(uniform_blocks=True), coding)
    encoders = [plain, plain, calibrated, calibrated, calibrated]
    positions = [0, 0, 34, 0, 51]
    objects = [
        PageObject(encoder.encode(bytes([number]) * 32, page, position))
        for number, (encoder, page, position) in enumerate(zip(encoders, values, positions, strict=True))
    ]
    assert [page.header.profile_name for page in objects] == ["high", "high", "high", "high", "exact"]
    return objects


@pytest.fixture
def rig(engine, transforms):
    made = Rig(engine, transforms, 6)
    yield made
    made.close()


def reference(transforms, pages, group, side):
    """What the transforms restore from the same bytes, decoded in software."""
    return GroupDecoder(transforms, open_decoder()).decode(pages, group.index, side)


def assert_restored(rig, pages, numbers):
    for group in GROUPS:
        for side in SPEC.sides:
            expected = reference(rig.transforms, pages, group, side)
            layers = slice(group.first_layer, group.first_layer + group.layers)
            for page, number, want in zip(pages, numbers, expected, strict=True):
                got = rig.known.page(number)[side][layers]
                if page.header.calibration_digest:
                    # The sums have another order: at most one unit in the last place of bfloat16.
                    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2e-3)
                else:
                    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert rig.known.others_are(rig.before, numbers)


@pytest.mark.parametrize("members", [[0, 1], [4, 2], [0, 2, 4, 3, 1]], ids=["plain", "calibrated and exact", "all"])
def test_pages_of_every_coding_come_into_their_slots_and_nowhere_else(rig, coded, members):
    pages = [coded[index] for index in members]
    numbers = [5, 0, 3, 1, 4][: len(members)]
    _, calls = rig.start([(pages, numbers)])
    assert [index for index, _ in calls] == [0, 1]
    assert all(events for _, events in calls)
    assert_restored(rig, pages, numbers)


@pytest.mark.parametrize("profiles", [["raw", "exact", "raw"], ["raw"]], ids=["with coded ones", "alone"])
def test_pages_that_are_not_coded_are_copied(engine, profiles):
    transforms = PageTransforms(SPEC, ("raw", "exact"))
    values = [page_values(SPEC, seed) for seed in range(len(profiles))]
    encoders = {
        coding.profile_name: PageEncoder(
            bytes(32), transforms, open_encoder() if coding.profile.has_pictures else None, coding
        )
        for coding in transforms.codings()
    }
    pages = [
        PageObject(encoders[profile].encode(bytes([number]) * 32, page))
        for number, (profile, page) in enumerate(zip(profiles, values, strict=True))
    ]
    rig, numbers = Rig(engine, transforms, 6), [5, 0, 3][: len(profiles)]
    with contextlib.closing(rig):
        _, calls = rig.start([(pages, numbers)])
        assert [index for index, _ in calls] == [0, 1]
        for number, page in zip(numbers, values, strict=True):
            assert same_bits(rig.known.page(number), page)
        assert rig.known.others_are(rig.before, numbers)


def test_decoders_go_on_while_what_they_gave_is_restored(rig, coded, monkeypatch):
    """Several jobs and segments, so that each decoder's buffers are filled again and again."""
    monkeypatch.setattr(restorer_module, "SEGMENT_PAGES", 2)
    pages = [coded[index] for index in (2, 4, 1, 0, 1)]
    _, calls = rig.start([(pages[:3], [2, 0, 4]), (pages[3:], [5, 1])])
    assert [index for index, _ in calls] == [0, 1]
    # A side of a group has a part for each segment; the segment of two codings decodes twice.
    assert [len(events) >= 2 * 3 for _, events in calls] == [True, True]
    assert_restored(rig, pages, [2, 0, 4, 5, 1])
    assert len(rig.decoders) <= 2


def changed(page, group_index, side, **changes):
    """The page object with another picture, digest or side bytes in one place, and good CRCs."""
    groups = [{each: page.side_data(group.index, each) for each in SPEC.sides} for group in GROUPS]
    data = groups[group_index][side]
    picture = PicturePart(
        changes.get("data", data.picture.data),
        changes.get("digest", data.picture.plane_digest),
        data.picture.steps,
    )
    groups[group_index][side] = SideData(picture, changes.get("stored", data.stored), data.escapes)
    header = page.header
    return PageObject(
        build_page_object(
            header.key,
            SPEC,
            header.profile_name,
            groups,
            page.parameter_sets,
            header.calibration_digest,
            header.first_position,
            (288, 192),
        )
    )


@pytest.mark.parametrize(("what", "bad"), [("another digest", 4), ("another picture", 2), ("a damaged picture", 1)])
def test_a_picture_that_is_not_the_one_promised_is_never_told(rig, coded, what, bad, capfd):
    """The page is blamed, its decoder given up, the layers of the group are not told."""
    right = coded[bad].side_data(1, Side.VALUE).picture
    damaged = bytearray(right.data)
    damaged[len(damaged) // 2] ^= 0x10
    changes = {
        "another digest": {"digest": right.plane_digest ^ 1 << 63},
        "another picture": {"data": coded[bad].side_data(1, Side.KEY).picture.data},
        "a damaged picture": {"data": bytes(damaged)},
    }[what]
    bad_page = changed(coded[bad], 1, Side.VALUE, **changes)
    before = metrics.DECODERS_REPLACED._value.get()
    restore, calls = rig.start([([coded[0], bad_page, coded[1]], [5, 0, 3])])
    assert isinstance(calls[-1], ChecksumError | CodecError)
    assert [index for index, _ in calls[:-1]] in ([], [0])
    assert restore.bad_pages == [bad_page]
    assert metrics.DECODERS_REPLACED._value.get() > before
    assert rig.known.others_are(rig.before, [5, 0, 3])
    # The decoder that came in its place is none the worse.
    good = [coded[0], coded[bad], coded[1]]
    _, calls = rig.start([(good, [5, 0, 3])])
    assert [index for index, _ in calls] == [0, 1]
    assert_restored(rig, good, [5, 0, 3])


def test_side_bytes_that_do_not_fit_are_their_pages_fault(rig, coded):
    bad = changed(coded[4], 0, Side.KEY, stored=coded[4].side_data(0, Side.KEY).stored[:-1])
    restore, calls = rig.start([([coded[0], bad, coded[1]], [5, 0, 3])])
    assert isinstance(calls[-1], FormatError)
    assert restore.bad_pages == [bad]
    assert rig.known.others_are(rig.before, [5, 0, 3])


class Hoarder:
    """A group decoder that decodes all segments before it hands out the first: too late, as the next call shows."""

    def __init__(self, inner):
        self._inner = inner

    def decode_frames(self, *args):
        yield from list(self._inner.decode_frames(*args))

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_planes_that_are_used_after_the_next_call_are_found_out(rig, coded):
    """What this file relies on: plain and calibrated pages have pictures of one size, and so one decoder."""
    rig.wrap = Hoarder
    _, calls = rig.start([([coded[2], coded[0]], [5, 0])])
    assert isinstance(calls[-1], ChecksumError)
    assert rig.known.others_are(rig.before, [5, 0])


@pytest.mark.rehearsal
def test_the_order_on_the_decoders_stream(rig, coded):
    """Digests before what waits for others; slots after those; the layers' event last; the host waits for digests."""
    after = [rig.streams.new_event("slots"), rig.streams.new_event("forward")]
    _, calls = rig.start([(coded[:2], [5, 0])], after)
    log = rig.streams.log
    events = {event.name for _, events in calls for event in events}
    by_stream = {decoder.stream: [] for decoder in rig.decoders}
    for entry in log:
        if entry[0] in by_stream:
            by_stream[entry[0]].append(entry[1:])
    assert sum(map(len, by_stream.values())) == 4 * 2 * len(GROUPS)
    for entries in by_stream.values():
        for work, read, wait, record in zip(*[iter(entries)] * 4, strict=True):
            assert (work, read, wait) == (("work",), ("read",), ("wait", "slots", "forward"))
            assert record[0] == "record"
            assert record[1] in events
    waits = [name for who, name, *_ in log if who == "host waits for"]
    assert waits.count("what was read") == 2 * len(GROUPS)
    # The others are this test's own, at the end.
    assert len(waits) == 2 * len(GROUPS) + len(events)


@pytest.mark.rehearsal
def test_a_failure_is_told_when_nothing_is_written_any_more(rig, coded):
    bad = changed(coded[0], 1, Side.VALUE, digest=1)
    _, calls = rig.start([([bad], [5])])
    assert isinstance(calls[-1], ChecksumError)
    recorded = {names[0] for _, what, *names in rig.streams.log if what == "record"}
    waited = {name for who, name, *_ in rig.streams.log if who == "host waits for"}
    assert recorded
    assert recorded <= waited
