import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.calibration import GainModel
from sglang_kvcodec.transform.token_gains import (
    COARSEST_LEVEL,
    UNIT_LEVEL,
    gains_of_levels,
    level_of_gain,
    pack_levels,
    predicted_levels,
    unpack_levels,
)


@given(st.integers(1, 4), st.integers(1, 67), st.integers(0, 2**32 - 1))
def test_levels_come_back(blocks, tokens, seed):
    levels = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (2, blocks, tokens)).astype(np.uint8))
    levels[1] = UNIT_LEVEL
    rows = [pack_levels(page) for page in levels]
    assert len(rows[1]) == 0
    assert torch.equal(unpack_levels(rows, blocks, tokens), levels)


def test_the_earlier_token_lies_in_the_lower_half():
    assert pack_levels(torch.tensor([[1, 2, 3]], dtype=torch.uint8)) == bytes([0x21, 0x03])


@pytest.mark.parametrize("data", [b"\0", bytes(5), bytes([0, 0x10]) * 2])
def test_bytes_that_are_no_levels_are_refused(data):
    with pytest.raises(FormatError):
        unpack_levels([data], 2, 3)


def test_a_level_is_half_an_octave():
    gains = gains_of_levels(torch.arange(16))
    assert gains[[0, 10, 12, 14]].tolist() == [2.0**-6, 0.5, 1.0, 2.0]
    assert gains[13] ** 2 == pytest.approx(2.0)
    assert [level_of_gain(float(gain)) for gain in gains] == list(range(16))


def test_predictions_follow_the_formula_and_stay_in_range():
    numbers = np.array([2.0, 0.5], np.float32), np.array([0.25, 0.0], np.float32), np.array([0.0, -0.5], np.float32)
    model = GainModel(0.5, *numbers)
    components = torch.tensor(
        [[0.0, 0.45, 9.0], [2.0, 0.45, 9.0], [1e6, 0.0, 0.0], [-1e6, 0.0, 0.0], [float("nan")] * 3]
    )
    levels = predicted_levels(components, model)
    first = 0.5 - 0.5 * np.log(0.9 + 0.1)
    assert levels.tolist()[:2] == [12 + round(2 * first), 12 + round(2 * (first + 0.25))]
    assert levels.tolist()[2:] == [COARSEST_LEVEL, 0, UNIT_LEVEL]
    assert predicted_levels(components, GainModel()).tolist() == [UNIT_LEVEL] * 5
