"""Pages packed where they lie in a pool, coded and published: what is read back is what the slots held."""

import contextlib
import gc
import threading

import pytest
import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig, Timeouts
from sglang_kvcodec.flow import page_packer
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.offload import Target
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.flow.page_packer import PagePacker
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import PagePacks
from sglang_kvcodec.kernels.check_pack import differences
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.pages import hash_of
from sglang_kvcodec.testing.rehearsal import RehearsalLibrary
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder
from sglang_kvcodec.video.nvenc import NvencEncoder

# NumPy, which interprets the kernels, warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)

SPEC = KVSpec(layers=4, kv_heads=3, head_dim=128, page_tokens=43, dtype=KVDtype.BFLOAT16)
"""Two layer groups, of three layers and of one."""
GROUPS = layer_groups(SPEC)
CALIBRATION = random_calibration(SPEC, layers_per_block=1, step=0.2, rope=neox_rope(128), kept=0.9, gain_components=2)
NAMESPACE = bytes(range(32))
OTHER_NAMESPACE = bytes(32)
PAGES = 4
LIMIT_S = 100
TIMEOUTS = Timeouts(connect_s=20, lookup_s=20, progress_s=20, fetch_s=60, put_s=60, retry_s=0.05)


class Rig:
    """A pool of four pages on the device, and a packer of one coding."""

    def __init__(self, device, profile, calibration=None, room_bytes=0):
        self.known = KnownPool(SPEC, PAGES)
        self.values = [self.known.fill(page, seed=10 * page) for page in range(PAGES)]
        self.device = torch.device(device)
        self.layers = {}
        self.digest = calibration.digest if calibration is not None else b""
        self.transforms = PageTransforms(SPEC, profile, [calibration] if calibration is not None else [])
        self.pool = PagedKVPool(SPEC, lambda: self.layers, self.device)
        self.to_device()
        packs = PagePacks(self.transforms, self.device)
        self.packer = PagePacker(self.pool, self.transforms, packs, self._coding_of, room_bytes)

    def to_device(self):
        self.layers = {
            side: [layer.to(self.device, copy=True) for layer in layers] for side, layers in self.known.buffers.items()
        }

    def set_value(self, page, value):
        """One value of a page."""
        self.known.buffers[Side.VALUE][3][self.known.slots([page])[-1], 2, 127] = value
        self.values[page] = self.known.page(page)
        self.to_device()

    def overwrite(self):
        for layers in self.layers.values():
            for layer in layers:
                layer.fill_(77)

    def slots(self, pages=range(PAGES)):
        return self.known.slots(pages).to(self.device)

    def pack(self, only=range(PAGES), first_position=0):
        return self.packer.pack(NAMESPACE, self.slots(), (), list(only), first_position)

    def _coding_of(self, namespace_digest):
        codings = self.transforms.codings(self.digest)
        return codings[0] if namespace_digest == NAMESPACE else codings[1]

    def encoder(self, namespace_digest=NAMESPACE):
        encoder = open_encoder(uniform_blocks=bool(self.digest))
        return PageEncoder(namespace_digest, self.transforms, encoder, self._coding_of(namespace_digest))

    def decode(self, page):
        decoder = GroupDecoder(self.transforms, open_decoder())
        return {
            side: torch.cat([decoder.decode([page], group.index, side)[0] for group in GROUPS]).cpu()
            for side in SPEC.sides
        }

    def assert_as_the_reference(self, coded, page, first_position=0):
        """What was coded from a packed page is the page object of its values, or all that rounding explains."""
        wanted = self.encoder().encode(hash_of(page), self.values[page], first_position)
        got, want = PageObject(coded), PageObject(wanted)
        assert got.header == want.header or got.header.calibration_digest
        if not got.header.calibration_digest:
            assert coded == wanted
            return
        assert got.header.first_position == want.header.first_position == first_position
        assert (got.header.profile_name, got.header.calibration_digest) == (
            want.header.profile_name,
            want.header.calibration_digest,
        )
        decoder = GroupDecoder(self.transforms, open_decoder())
        transform = self.transforms.get(got.header.profile_name, self.digest)
        for group in GROUPS:
            layers = slice(group.first_layer, group.first_layer + group.layers)
            for side in SPEC.sides:
                ours, theirs = (decoder.unpack([each], group.index, side) for each in (got, want))
                values = self.values[page][side][None, layers]
                assert differences(transform, group, side, values, [first_position], ours, theirs) == []


def coding(name):
    return ("high", CALIBRATION) if name == "calibrated" else (name, None)


ALL_CODINGS = pytest.mark.parametrize("name", ["exact", "high", "calibrated"])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that the staging memory is used again within one call."""
    monkeypatch.setattr(page_packer, "BATCH_PAGES", 2)


@ALL_CODINGS
def test_page_objects_of_packed_pages_are_those_of_their_values(name, device):
    rig = Rig(device, *coding(name))
    only, first_position = [3, 0, 2], 5 * SPEC.page_tokens
    packed = rig.pack(only, first_position)
    # What is packed is nobody else's: neither the slots' next owner's nor the next pages'.
    rig.overwrite()
    rig.pack([0, 1])
    encoder = rig.encoder()
    for page, number in zip(packed, only, strict=True):
        position = first_position + number * SPEC.page_tokens
        assert page.first_position == (position if rig.digest else 0)
        assert page.size_bytes <= rig.packer.page_bytes(NAMESPACE) + sum(len(side.escapes) for side in page.sides)
        rig.assert_as_the_reference(encoder.encode_packed(hash_of(number), page), number, position)


def test_only_a_page_that_a_tier_cant_code_is_exact(device, monkeypatch):
    monkeypatch.setattr(page_packer, "BATCH_PAGES", PAGES)
    rig = Rig(device, *coding("calibrated"))
    rig.set_value(2, float("nan"))
    packed = rig.pack()
    assert [page.profile_name for page in packed] == ["high", "high", "exact", "high"]
    assert [page.calibration_digest for page in packed] == [rig.digest, rig.digest, b"", rig.digest]
    encoder = rig.encoder()
    for number, page in enumerate(packed):
        coded = encoder.encode_packed(hash_of(number), page)
        rig.assert_as_the_reference(coded, number, page.first_position)
    assert same_bits(rig.decode(PageObject(encoder.encode_packed(hash_of(2), packed[2]))), rig.values[2])


def test_no_pages_are_no_pages(device):
    assert Rig(device, "exact").pack([]) == []


def test_room_on_the_device_is_bounded_and_comes_back_with_the_pages(device, monkeypatch):
    monkeypatch.setattr(page_packer, "BATCH_PAGES", 1)
    rows, width = PageTransforms(SPEC, "exact").get("exact").canvas_shape
    rig = Rig(device, "exact", room_bytes=2 * len(GROUPS) * len(SPEC.sides) * rows * width)
    packed = rig.pack([0, 1, 2])
    assert [page.is_on_device for page in packed] == [True, True, False]
    encoder = PageEncoder(NAMESPACE, rig.transforms, NvencEncoder(RehearsalLibrary(), 0))
    if rig.device.type == "cpu":
        # The stand-in reads planes by their addresses in host memory.
        for number, page in enumerate(packed):
            coded = PageObject(encoder.encode_packed(hash_of(number), page))
            assert same_bits(rig.decode(coded), rig.values[number])
    assert not rig.pack([3])[0].is_on_device
    page = None  # The last one of the loop above, which a GPU has not been through.
    del packed[0]
    gc.collect()
    (again,) = rig.pack([3])
    assert again.is_on_device
    assert not rig.pack([3])[0].is_on_device


def test_room_taken_for_what_cant_be_coded_comes_back(device, monkeypatch):
    monkeypatch.setattr(page_packer, "BATCH_PAGES", PAGES)
    rig = Rig(device, *coding("calibrated"), room_bytes=1 << 30)
    rig.set_value(1, float("inf"))
    packed = rig.pack()
    assert [page.profile_name for page in packed] == ["high", "exact", "high", "high"]
    assert all(page.is_on_device for page in packed)
    assert rig.packer._device_room._left == (1 << 30) - sum(page.canvases.numel() for page in packed)
    del packed
    gc.collect()
    assert rig.packer._device_room._left == 1 << 30


class Publishing:
    """A publisher with a packer, and a peer that keeps pages in memory."""

    def __init__(self, rig, stack, before_encode=lambda: None, on_page=None, **changes):
        self.rig = rig
        self.engine = MemoryEngine(1 << 30)
        peer = LocalPeer(self.engine)
        stack.callback(peer.stop)
        client = GrpcPeer(peer.remote, TIMEOUTS, 0)
        monitor = PeerMonitor(client, TIMEOUTS.retry_s)
        stack.callback(client.close)
        stack.callback(monitor.close)
        assert monitor.wait_until_up(LIMIT_S)
        config = ServerConfig(
            remote=peer.remote, profile=",".join(rig.transforms.tiers), min_fetch_tokens=1, timeouts=TIMEOUTS, **changes
        )

        class Encoder:
            def __init__(self, namespace_digest):
                self._inner = rig.encoder(namespace_digest)

            def encode_packed(self, page_hash, page):
                before_encode()
                return self._inner.encode_packed(page_hash, page)

            def encode(self, page_hash, values, first_position):
                return self._inner.encode(page_hash, values, first_position)

        self.publisher = Publisher(
            client,
            monitor,
            StoredPages(),
            rig.pool,
            Encoder,
            lambda namespace_digest: rig.transforms.tiers[0],
            config,
            on_page,
            packer=rig.packer,
        )
        stack.callback(self.publisher.close)

    def offload(self, pages=range(PAGES), first_position=0):
        hashes = [hash_of(page) for page in pages]
        return self.publisher.offload(
            [Target(NAMESPACE, range(len(hashes)))], hashes, self.rig.slots(pages), (), first_position
        )

    def stored(self, page):
        return self.engine.get(PageKey(NAMESPACE, hash_of(page)).to_bytes())


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


def queued_bytes():
    return metrics.PUBLISH_QUEUE_BYTES._value.get()


def dropped(reason):
    return metrics.PUBLISH_DROPS.labels(reason=reason)._value.get()


@ALL_CODINGS
def test_published_pages_are_those_of_their_values(name, device, stack):
    rig = Rig(device, *coding(name))
    shown = []
    publishing = Publishing(rig, stack, on_page=lambda values, position: shown.append((position, values)))
    first_position = 3 * SPEC.page_tokens
    offload = publishing.offload([1, 3, 0], first_position)
    assert offload.wait(LIMIT_S)
    assert offload.succeeded is True
    rig.overwrite()
    assert publishing.publisher.wait_until_empty(LIMIT_S)
    for index, page in enumerate([1, 3, 0]):
        position = first_position + index * SPEC.page_tokens
        rig.assert_as_the_reference(publishing.stored(page), page, position)
        assert shown[index][0] == position
        assert same_bits(shown[index][1], rig.values[page])
    assert queued_bytes() == 0


def test_pages_that_are_not_coded_are_copied_beside_packed_ones(device, stack):
    rig = Rig(device, ("raw", "exact"))
    publishing = Publishing(rig, stack)
    targets = [Target(NAMESPACE, [0, 1]), Target(OTHER_NAMESPACE, [1, 2])]
    hashes = [hash_of(page) for page in range(3)]
    offload = publishing.publisher.offload(targets, hashes, rig.slots(range(3)), ())
    assert offload.wait(LIMIT_S)
    assert offload.succeeded is True
    rig.overwrite()
    assert publishing.publisher.wait_until_empty(LIMIT_S)
    assert publishing.engine.stat().objects == 4
    decoder = GroupDecoder(rig.transforms, open_decoder())
    for target in targets:
        for page in target.pages:
            stored = PageObject(publishing.engine.get(target.namespace_digest + hash_of(page)))
            for group in GROUPS:
                layers = slice(group.first_layer, group.first_layer + group.layers)
                for side in SPEC.sides:
                    (values,) = decoder.decode([stored], group.index, side)
                    assert torch.equal(values.view(torch.int16), rig.values[page][side][layers].view(torch.int16))
    assert queued_bytes() == 0


def test_the_queue_holds_what_it_may_and_the_rest_is_dropped_and_counted(device, stack):
    rig = Rig(device, "exact")
    gate, begun = threading.Event(), threading.Event()
    page_bytes = rig.packer.page_bytes(NAMESPACE)

    def hold():
        begun.set()
        gate.wait(LIMIT_S)

    publishing = Publishing(rig, stack, hold, publish_queue_bytes=page_bytes)
    stack.callback(gate.set)
    before = dropped("queue_full")
    assert publishing.offload([0]).wait(LIMIT_S)
    assert begun.wait(LIMIT_S)
    # What is being encoded can't make room.
    assert publishing.offload([2]).succeeded is False
    assert dropped("queue_full") == before + 1
    assert 0 < queued_bytes() <= page_bytes
    gate.set()
    assert publishing.publisher.wait_until_empty(LIMIT_S)
    assert queued_bytes() == 0
    assert publishing.stored(2) is None
    assert same_bits(rig.decode(PageObject(publishing.stored(0))), rig.values[0])


def test_a_page_whose_escapes_find_no_room_is_dropped_and_counted(device, stack):
    rig = Rig(device, "high")
    # Noise of all magnitudes: each layer is escaped as a whole.
    rig.known.buffers = KnownPool(SPEC, PAGES, seed=0).buffers
    rig.values = [rig.known.page(page) for page in range(PAGES)]
    rig.to_device()
    size_bytes = rig.pack([0])[0].size_bytes
    page_bytes = rig.packer.page_bytes(NAMESPACE)
    assert size_bytes > page_bytes
    gate = threading.Event()
    publishing = Publishing(rig, stack, lambda: gate.wait(LIMIT_S), publish_queue_bytes=2 * page_bytes)
    stack.callback(gate.set)
    before = dropped("queue_full")
    assert publishing.offload([0, 1]).wait(LIMIT_S)
    gate.set()
    assert publishing.publisher.wait_until_empty(LIMIT_S)
    assert dropped("queue_full") > before
    assert queued_bytes() == 0


def test_slots_that_are_no_whole_pages_settle_as_failed(device, stack):
    rig = Rig(device, "exact")
    publishing = Publishing(rig, stack)
    before = dropped("copy_failed")
    offload = publishing.publisher.offload([Target(NAMESPACE, [0])], [hash_of(0)], rig.slots([0])[:-1], ())
    assert offload.wait(LIMIT_S)
    assert offload.succeeded is False
    assert dropped("copy_failed") == before + 1
    assert queued_bytes() == 0
    assert publishing.offload([1]).wait(LIMIT_S)
    assert publishing.publisher.wait_until_empty(LIMIT_S)
    assert same_bits(rig.decode(PageObject(publishing.stored(1))), rig.values[1])
