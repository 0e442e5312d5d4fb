"""The reference gives the same bits on every device. Torch alone is needed."""

import pytest
import torch

from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.transform.rope import rotate, unrotate


@pytest.mark.gpu
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("first", [0, 1_048_000])
def test_a_gpu_gives_the_bits_of_the_cpu(first, is_interleaved):
    frequencies = tuple(5e5 ** (-i / 20) for i in range(20))
    rope = RopeSpec(43, 40, frequencies, is_interleaved, 1.1386294364929199)
    values = torch.randn(2, 67, 3, 43, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(first, first + 67)
    for turn in (rotate, unrotate):
        expected = turn(values, positions, rope)
        assert torch.equal(turn(values.cuda(), positions, rope).cpu(), expected)
        assert torch.equal(turn(values.cuda(), positions.cuda(), rope).cpu(), expected)
