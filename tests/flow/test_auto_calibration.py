import dataclasses
import threading

import pytest
import torch
from flow_kit import LIMIT_S, TIMEOUTS, counted

from sglang_kvcodec.calibration.by_noise import NOISE_TO_SIGNAL, tokens_needed
from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.flow import auto_calibration as module
from sglang_kvcodec.flow.auto_calibration import LAYERS_PER_BLOCK, TOKENS_MARGIN, AutoCalibration
from sglang_kvcodec.format.calibration import Calibration, ShardLayout
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.calibrations import MODEL_DIGEST, neox_rope, random_calibration
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.transform import PageTransforms

SPEC = KVSpec(layers=7, kv_heads=2, head_dim=8, page_tokens=48, dtype=KVDtype.BFLOAT16)
LAYOUT = ShardLayout(SPEC.layers, SPEC.kv_heads, SPEC.head_dim)
ROPE = neox_rope(SPEC.head_dim)
PAGES = int(TOKENS_MARGIN * tokens_needed(LAYOUT, LAYERS_PER_BLOCK)) // SPEC.page_tokens + 1
"""So many are enough."""


def correlated_page(number):
    """Values around a mean that depend on each other across heads and layers; K is not even rotated."""
    mixing = torch.randn(224, 224, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 224)
    generator = torch.Generator().manual_seed(1 + number)
    values = torch.randn(SPEC.page_tokens, 224, generator=generator) @ mixing.T + 3.0
    sides = values.view(SPEC.page_tokens, 2, SPEC.layers, SPEC.kv_heads, SPEC.head_dim).permute(1, 2, 0, 3, 4)
    return {side: sides[index].to(torch.bfloat16) for index, side in enumerate(SPEC.sides)}


class Setup:
    """One that gathers, and what comes of it."""

    def __init__(self, peer, profile="balanced"):
        self.peer = peer
        self.transforms = PageTransforms(SPEC, profile)
        self.used = []
        self.auto = AutoCalibration(
            peer, 0.05, KVStatistics(LAYOUT, ROPE, LAYERS_PER_BLOCK), MODEL_DIGEST, self.transforms, self.used.append
        )

    def feed(self, pages=PAGES, page=correlated_page):
        """Offers pages, each when there is room for it."""
        for number in range(pages):
            while self.auto._queue.full() and not self.auto.wait(0.001):
                pass
            self.auto.offer(page(number), number * SPEC.page_tokens)

    def finish(self):
        self.feed()
        assert self.auto.wait(LIMIT_S)
        self.auto.close()


@pytest.fixture
def client(local_peer, closing):
    peer = GrpcPeer(local_peer.remote, TIMEOUTS)
    closing.callback(peer.close)
    return peer


@pytest.fixture
def set_up(client, closing):
    def make(peer=client, **options):
        setup = Setup(peer, **options)
        closing.callback(setup.auto.close)
        return setup

    return make


def test_a_calibration_is_made_stored_and_used(set_up, client, delta):
    setup = set_up()
    setup.finish()
    (calibration,) = setup.used
    stored = Calibration.from_bytes(client.get_calibration(MODEL_DIGEST), expected_model=MODEL_DIGEST)
    assert stored.digest == calibration.digest
    assert (stored.layout, stored.rope) == (LAYOUT, ROPE)
    assert set(stored.tiers) == set(NOISE_TO_SIGNAL)
    assert delta("kvcodec_calibrations_total", outcome="made") == 1
    assert counted("kvcodec_calibration_tokens") == 0
    setup.transforms.get("balanced", calibration.digest)


@pytest.mark.parametrize(("profile", "noise_to_signal"), NOISE_TO_SIGNAL.items())
def test_each_tier_adds_no_more_noise_than_it_may_and_not_much_less(set_up, profile, noise_to_signal):
    setup = set_up(profile=profile)
    setup.finish()
    transform = setup.transforms.get(profile, setup.used[0].digest)
    pages = [correlated_page(number) for number in range(100, 110)]
    positions = [number * SPEC.page_tokens for number in range(10)]
    ratios = []
    for group in layer_groups(SPEC):
        layers = slice(group.first_layer, group.first_layer + group.layers)
        for side in SPEC.sides:
            values = torch.stack([page[side][layers] for page in pages])
            packed = transform.pack(group, side, values, positions)
            restored = transform.restore(group, side, packed, positions)
            noise = (restored.float() - values.float()).square().mean((0, 2, 3, 4))
            power = (values.float() - values.float().mean((0, 2), keepdim=True)).square().mean((0, 2, 3, 4))
            ratios += (noise / power).tolist()
    mean = sum(ratios) / len(ratios)
    assert noise_to_signal / 10 < mean < 1.2 * noise_to_signal


def test_nothing_happens_before_there_are_enough_tokens(set_up, client):
    setup = set_up()
    setup.feed(PAGES - 1)
    assert not setup.auto.wait(0)
    setup.auto.close()
    assert setup.used == []
    assert client.get_calibration(MODEL_DIGEST) is None


def test_a_page_is_copied_and_never_waited_for(set_up, monkeypatch):
    release, adding, added = threading.Event(), threading.Event(), []

    def add(self, kv, first_position):
        adding.set()
        assert release.wait(LIMIT_S)
        added.append((kv[Side.KEY].clone(), first_position))

    monkeypatch.setattr(KVStatistics, "add", add)
    setup = set_up()
    page = correlated_page(0)
    before = page[Side.KEY].clone()
    setup.auto.offer(page, 7)
    assert adding.wait(LIMIT_S)
    page[Side.KEY].zero_()
    for number in range(2 * module.QUEUE_PAGES):
        setup.auto.offer(correlated_page(1), number)
    assert setup.auto._queue.full()
    release.set()
    setup.auto.close()
    assert added[0][1] == 7
    assert torch.equal(added[0][0], before)


def test_what_another_server_has_stored_meanwhile_is_used(set_up, client, delta):
    setup = set_up()
    theirs = random_calibration(SPEC)
    client.put_calibration(MODEL_DIGEST, theirs.encoded)
    setup.finish()
    assert [calibration.digest for calibration in setup.used] == [theirs.digest]
    assert len(client.list_calibrations()) == 1
    assert delta("kvcodec_calibrations_total", outcome="used") == 1
    setup.transforms.get("balanced", theirs.digest)


def test_what_is_stored_while_one_is_computed_goes_first(set_up, client, monkeypatch):
    theirs = random_calibration(SPEC)
    make = module.calibrate_by_noise

    def slow(*args):
        client.put_calibration(MODEL_DIGEST, theirs.encoded)
        return make(*args)

    monkeypatch.setattr(module, "calibrate_by_noise", slow)
    setup = set_up()
    setup.finish()
    assert [calibration.digest for calibration in setup.used] == [theirs.digest]
    assert len(client.list_calibrations()) == 1


def test_garbage_at_the_peer_is_put_over(set_up, client, delta):
    client.put_calibration(MODEL_DIGEST, b"garbage")
    setup = set_up()
    setup.finish()
    assert client.get_calibration(MODEL_DIGEST) == setup.used[0].encoded
    assert delta("kvcodec_calibrations_total", outcome="made") == 1


def test_a_calibration_that_merely_does_not_fit_is_left_alone(set_up, client, delta, caplog):
    theirs = random_calibration(SPEC)
    theirs = dataclasses.replace(theirs, tiers={"high": theirs.tiers["high"]})
    client.put_calibration(MODEL_DIGEST, theirs.encoded)
    setup = set_up()
    setup.finish()
    assert setup.used == []
    assert client.get_calibration(MODEL_DIGEST) == theirs.encoded
    assert delta("kvcodec_calibrations_total", outcome="calibration") == 1
    assert "stays uncalibrated" in caplog.text


def test_kv_without_spread_makes_no_calibration(set_up, client, delta):
    setup = set_up()
    setup.feed(page=lambda number: {side: torch.ones_like(each) for side, each in correlated_page(0).items()})
    assert setup.auto.wait(LIMIT_S)
    assert setup.used == []
    assert client.get_calibration(MODEL_DIGEST) is None
    assert delta("kvcodec_calibrations_total", outcome="calibration") == 1


def test_an_error_nobody_thought_of_ends_it_and_nothing_else(set_up, monkeypatch, delta):
    monkeypatch.setattr(module, "calibrate_by_noise", lambda *args: 1 / 0)
    setup = set_up()
    setup.finish()
    assert setup.used == []
    assert delta("kvcodec_calibrations_total", outcome="failed") == 1
    setup.auto.offer(correlated_page(0), 0)


def test_a_peer_that_is_away_is_waited_for(engine, local_peer, set_up, client, closing):
    setup = set_up()
    address = local_peer.address
    local_peer.stop()
    setup.feed()
    assert not setup.auto.wait(0.3)
    second = LocalPeer(engine, address)
    closing.callback(second.stop)
    assert setup.auto.wait(LIMIT_S)
    assert client.get_calibration(MODEL_DIGEST) == setup.used[0].encoded


def test_a_peer_without_room_is_not_coded_for(set_up, client, monkeypatch, delta):
    monkeypatch.setattr(
        client, "put_calibration", lambda *args: (_ for _ in ()).throw(module.PeerRejectedError("full"))
    )
    setup = set_up()
    setup.finish()
    assert setup.used == []
    assert delta("kvcodec_calibrations_total", outcome="peer_rejected") == 1


def test_new_weights_end_it(set_up, client):
    setup = set_up()
    setup.feed(3)
    setup.auto.stop()
    setup.feed()
    setup.auto.close()
    assert not setup.auto._thread.is_alive()
    assert setup.used == []
    assert client.get_calibration(MODEL_DIGEST) is None
