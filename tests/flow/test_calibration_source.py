import contextlib
import dataclasses
import logging

import pytest
import torch
from flow_kit import GROUPED, TIMEOUTS

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.errors import ConfigurationError, ForeignPageError
from sglang_kvcodec.flow import calibrations
from sglang_kvcodec.flow.calibrations import CalibrationSearch, search_calibration, settle_calibration
from sglang_kvcodec.format.calibration import CALIBRATION_VERSION
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.calibrations import MODEL_DIGEST, random_calibration
from sglang_kvcodec.transform import PageTransforms

OTHER_MODEL = bytes(range(32, 64))


@pytest.fixture
def client(local_peer, closing):
    return closing.enter_context(contextlib.closing(GrpcPeer(local_peer.remote, TIMEOUTS)))


@pytest.fixture
def transforms():
    return PageTransforms(GROUPED, "balanced")


def search(peer, transforms, digest=lambda: MODEL_DIGEST):
    return search_calibration(peer, digest, transforms)


def assert_nothing_found(found, outcome, transforms, *calibrations):
    assert (found.calibration, found.outcome) == (None, outcome)
    assert found.why
    assert "\n" not in found.why
    for calibration in calibrations:
        with pytest.raises(ForeignPageError):
            transforms.get("balanced", calibration.digest)


def test_the_current_calibration_is_found_and_learnt(client, transforms):
    older, newer = random_calibration(GROUPED, seed=1), random_calibration(GROUPED, seed=2)
    for calibration in (older, newer):
        client.put_calibration(MODEL_DIGEST, calibration.encoded)
    found = search(client, transforms)
    assert (found.outcome, found.calibration.digest) == ("used", newer.digest)
    transforms.get("balanced", newer.digest)


def test_no_calibration(client, transforms):
    client.put_calibration(OTHER_MODEL, random_calibration(GROUPED).encoded)
    assert_nothing_found(search(client, transforms), "not_stored", transforms)


SPOILT = {
    "format": lambda good: good[:-7],
    "unknown_format": lambda good: good.replace(
        b'\\"version\\":%d' % CALIBRATION_VERSION, b'\\"version\\":%d' % (CALIBRATION_VERSION + 1)
    ),
    "foreign_page": lambda good: random_calibration(GROUPED, model_digest=OTHER_MODEL).encoded,
}


@pytest.mark.parametrize(("outcome", "spoil"), SPOILT.items(), ids=SPOILT)
def test_a_stored_artifact_that_is_not_what_it_should_be(client, transforms, outcome, spoil):
    good = random_calibration(GROUPED)
    assert spoil(good.encoded) != good.encoded
    client.put_calibration(MODEL_DIGEST, spoil(good.encoded))
    assert_nothing_found(search(client, transforms), outcome, transforms, good)


@pytest.mark.parametrize(
    "other",
    [
        random_calibration(dataclasses.replace(GROUPED, layers=8)),
        random_calibration(dataclasses.replace(GROUPED, kv_heads=2)),
        random_calibration(GROUPED, layers_per_block=2),
        dataclasses.replace(random_calibration(GROUPED), tiers={"high": random_calibration(GROUPED).tiers["high"]}),
    ],
    ids=["layers", "heads", "blocks that do not fit the pictures", "without the tier"],
)
def test_a_calibration_of_another_shape(client, transforms, other):
    client.put_calibration(MODEL_DIGEST, other.encoded)
    assert_nothing_found(search(client, transforms), "foreign_page", transforms, other)


def test_no_peer(transforms, closing):
    client = closing.enter_context(contextlib.closing(GrpcPeer("grpc://127.0.0.1:1", TIMEOUTS)))
    assert_nothing_found(search(client, transforms), "peer_unavailable", transforms)


def test_a_peer_that_takes_too_long(local_peer, transforms, closing):
    patient = closing.enter_context(contextlib.closing(GrpcPeer(local_peer.remote, TIMEOUTS)))
    patient.put_calibration(MODEL_DIGEST, random_calibration(GROUPED).encoded)
    hurried = GrpcPeer(local_peer.remote, Timeouts(calibration_s=1e-6))
    closing.callback(hurried.close)
    assert_nothing_found(search(hurried, transforms), "peer_timeout", transforms)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ConfigurationError("no files"), "unknown_model"), (PermissionError("no"), "unreadable_model")],
)
def test_a_model_whose_name_is_not_known(client, transforms, error, outcome):
    def digest():
        raise error

    assert_nothing_found(search(client, transforms, digest), outcome, transforms)


def test_a_device_without_room_for_the_bases(client, transforms, monkeypatch):
    def add(calibration):
        raise torch.OutOfMemoryError("2 GiB\nand a long table")

    client.put_calibration(MODEL_DIGEST, random_calibration(GROUPED).encoded)
    monkeypatch.setattr(transforms, "add", add)
    assert_nothing_found(search(client, transforms), "out_of_memory", transforms)


def settled(found, transforms, caplog, others=True):
    asked = []

    def all_ranks(mine):
        asked.append(mine)
        return mine and others

    with caplog.at_level(logging.INFO, calibrations.__name__):
        result = settle_calibration(found, transforms, all_ranks)
    assert asked == [found.calibration is not None]
    (said,) = [record.getMessage() for record in caplog.records if record.name == calibrations.__name__]
    return result, said


def test_a_calibration_that_all_ranks_have_is_used(transforms, caplog, delta):
    calibration = random_calibration(GROUPED)
    result, said = settled(CalibrationSearch(calibration, "used"), transforms, caplog)
    assert result is calibration
    assert calibration.digest.hex()[:16] in said
    assert delta("kvcodec_calibrations_total", outcome="used") == 1


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (CalibrationSearch(None, "not_stored", "the peer has none"), "not_stored"),
        (CalibrationSearch(random_calibration(GROUPED), "used"), "other_rank"),
    ],
)
def test_without_one_the_server_says_as_what_it_runs_and_why(transforms, caplog, delta, found, outcome):
    result, said = settled(found, transforms, caplog, others=False)
    assert result is None
    assert "profile 'balanced' runs uncalibrated, as 'high'" in said
    assert outcome in said
    assert found.why in said
    assert delta("kvcodec_calibrations_total", outcome=outcome) == 1
    assert delta("kvcodec_calibrations_total", outcome="used") == 0


def test_a_server_without_patience_is_a_mistake():
    with pytest.raises(ConfigurationError, match="start_calibration_s"):
        Timeouts(start_calibration_s=0)
