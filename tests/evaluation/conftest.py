import pathlib

import pytest
import torch

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.models import CausalLM

TINY = pathlib.Path(__file__).parents[1] / "models/tiny-code-lm"


@pytest.fixture(scope="session")
def model():
    return CausalLM.load(TINY)


@pytest.fixture(scope="session")
def spec():
    return KVSpec(5, 3, 40, 16, KVDtype.BFLOAT16)


@pytest.fixture(scope="session")
def kv(spec):
    """Channels of different size and offset, tokens that resemble their neighbours, one outlier and a dead channel."""
    generator = torch.Generator().manual_seed(3)
    sides = {}
    for side in (Side.KEY, Side.VALUE):
        noise = torch.randn(5, 48, 3, 40, generator=generator)
        walk = (noise + noise.roll(1, 1) + noise.roll(2, 1)) / 3**0.5
        values = walk * torch.logspace(-1, 1, 40) + torch.randn(3, 40, generator=generator) * 3
        values[2, 17, 1, 5] = 311.0
        values[..., 2, 7] = 0.0
        sides[side] = values.bfloat16()
    return sides
