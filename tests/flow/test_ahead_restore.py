"""Pages that are restored before anyone has their slots: how far they are, and when nothing is written any more."""

import types

import pytest
import torch

from sglang_kvcodec.errors import ArrivalError
from sglang_kvcodec.flow.ahead_restore import AheadRestore, Progress

GROUPS = [types.SimpleNamespace(first_layer=first, layers=layers) for first, layers in ((0, 3), (3, 1))]
SLOTS = torch.arange(32)


class Event:
    def __init__(self):
        self.has_come = False

    def query(self):
        return self.has_come


class Restorer:
    def __call__(self, jobs, on_layers, on_failure):
        self.jobs, self.on_layers, self.on_failure = jobs, on_layers, on_failure
        return types.SimpleNamespace(bad_pages=["bad"])


@pytest.fixture
def restorer():
    return Restorer()


@pytest.fixture
def ahead(restorer):
    return AheadRestore(["a", "b"], SLOTS, 4, restorer)


def test_all_layers_have_to_be_in_the_pool(ahead, restorer):
    (job,) = restorer.jobs
    assert job.pages == ["a", "b"]
    assert job.slots is SLOTS
    event = Event()
    restorer.on_layers(GROUPS[0], [event])
    assert ahead.progress is Progress.UNDER_WAY
    restorer.on_layers(GROUPS[1], [])
    # It is queued, and the device has not come to it yet.
    assert ahead.progress is Progress.UNDER_WAY
    assert not ahead.is_idle
    event.has_come = True
    assert ahead.progress is Progress.RESTORED
    assert ahead.is_idle
    assert ahead.take() is SLOTS
    assert ahead.leftover() is None


def test_one_that_fails_leaves_its_slots(ahead, restorer):
    restorer.on_layers(GROUPS[0], [])
    restorer.on_failure(ArrivalError("gone"))
    assert ahead.progress is Progress.FAILED
    assert ahead.is_idle
    assert ahead.bad_pages == ["bad"]
    assert ahead.leftover() is SLOTS
    assert ahead.leftover() is None


def test_of_several_ranks_the_least_counts():
    assert min([Progress.RESTORED, Progress.FAILED, Progress.UNDER_WAY]) is Progress.FAILED
    assert min([Progress.RESTORED, Progress.UNDER_WAY]) is Progress.UNDER_WAY
