"""A short, always equal run of what scripts/fuzz does for long, and what it has found."""

import itertools
import logging

import pytest
from fuzzing.calibrations import EDITS
from fuzzing.mutations import mutants
from fuzzing.parsers import MODULES_OF, load
from fuzzing.target import FindingError, Target, require

INPUTS = {"page": 20_000, "values": 6_000, "calibration": 20_000, "archive": 20_000, "wire": 20_000}


def test_no_parser_is_left_out():
    assert set(INPUTS) == set(MODULES_OF)


@pytest.mark.parametrize("name", INPUTS)
def test_a_parser_accepts_what_is_sound_and_refuses_the_rest_in_typed_words(name, caplog):
    caplog.set_level(logging.CRITICAL)
    target = load(name)
    seeds = target.seeds()
    # Those that are not accepted show a refusal that is worth beginning with.
    assert sum(map(target.check, seeds)) > len(seeds) // 2
    inputs = itertools.islice(mutants(seeds, 1, target.words), INPUTS[name])
    accepted = sum(map(target.check, inputs))
    assert 0 < accepted < INPUTS[name] // 2


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("calibration", bytes([EDITS]) + b"z\x12", id="infinity among the notes"),
        pytest.param("calibration", bytes([EDITS, 0, 19]), id="NaN for an object"),
    ],
)
def test_what_was_found_once(name, data):
    assert not load(name).check(data)


def test_mutants_are_the_same_for_the_same_seed_and_none_is_larger_than_it_should_be():
    one, same, other = (list(itertools.islice(mutants([b"seed", bytes(70_000)], seed), 500)) for seed in (1, 1, 2))
    assert one == same != other
    assert max(map(len, one[2:])) <= 1 << 16


def test_a_finding_is_no_refusal():
    """An error that a parser does not promise comes out of its target."""

    def check(data):
        require(data != b"garbage", "garbage was accepted")
        return True

    with pytest.raises(FindingError, match="garbage"):
        Target("any", "", check, list).check(b"garbage")
