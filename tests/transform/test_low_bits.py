import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.calibration import MAX_LOW_BITS
from sglang_kvcodec.transform.low_bits import (
    join_low_bits,
    low_bit_counts,
    low_bits_bytes,
    split_low_bits,
)

COUNTS = st.lists(st.integers(0, MAX_LOW_BITS), min_size=1, max_size=9)


@settings(max_examples=60)
@given(counts=COUNTS, tokens=st.integers(1, 70), seed=st.integers(0, 99), limit=st.sampled_from([1, 300, 1 << 20]))
def test_what_is_split_joins_again(counts, tokens, seed, limit):
    counts = torch.tensor(counts, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    shape = (3, tokens, len(counts))
    quantised = torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int32)
    high, stored = split_low_bits(quantised, counts)
    assert stored.shape == (3, low_bits_bytes(counts, tokens))
    assert torch.equal(join_low_bits(high, stored, counts), quantised)
    # The high part is the nearest multiple, so its sign and its zero mean stay.
    assert bool(((high << counts) - quantised).abs().le((1 << counts) >> 1).all())


def test_the_bytes_are_as_documented():
    counts = torch.tensor([0, 2, 1], dtype=torch.int32)
    # Component 1: 5 + 2 = 0b1_11 and -2 + 2 = 0b0_00; component 2: 4 + 1 = 0b10_1 and -1 + 1 = 0b0_0.
    quantised = torch.tensor([[[9, 5, 4], [-9, -2, -1]]], dtype=torch.int32)
    high, stored = split_low_bits(quantised, counts)
    assert high.tolist() == [[[9, 1, 2], [-9, 0, 0]]]
    assert stored.tolist() == [[0b01, 0b01, 0b01]]


def test_tokens_beyond_a_byte_come_in_order():
    quantised = torch.zeros(1, 17, 1, dtype=torch.int32)
    quantised[0, [0, 9, 16]] = 1
    _, stored = split_low_bits(quantised - 1, torch.tensor([1], dtype=torch.int32))
    assert stored.tolist() == [[1, 2, 1]]


def test_wide_components_give_up_their_noise():
    deviations = torch.tensor([0.0, 0.2, 2.99, 3.0, 5.99, 6.0, 48.0, 1e9])
    assert low_bit_counts(deviations).tolist() == [0, 0, 0, 1, 1, 2, 5, MAX_LOW_BITS]


def test_bytes_of_other_components_are_refused():
    counts = torch.tensor([1, 3], dtype=torch.int32)
    high, stored = split_low_bits(torch.zeros(2, 17, 2, dtype=torch.int32), counts)
    with pytest.raises(FormatError):
        join_low_bits(high, stored[:, 1:], counts)
    with pytest.raises(FormatError):
        join_low_bits(high, stored[:1], counts)
