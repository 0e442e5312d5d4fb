import pytest
import torch

from sglang_kvcodec.calibration.bases import SHRINKAGE, solve_bases
from sglang_kvcodec.calibration.statistics import START_TOKENS, KVStatistics
from sglang_kvcodec.errors import CalibrationError
from sglang_kvcodec.format.calibration import ShardLayout
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.testing.calibrations import neox_rope
from sglang_kvcodec.transform.rope import rotate, unrotate

LAYOUT = ShardLayout(layers=5, kv_heads=2, head_dim=8)
ROPE = neox_rope(8, 4, 1.25)


def some_kv(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((5 * 16, 5 * 16), generator=generator) * torch.logspace(0.5, -1.5, 80)
    values = torch.randn((2, tokens, 80), generator=generator) @ mixing + torch.randn(80, generator=generator)
    shaped = values.view(2, tokens, 5, 2, 8).transpose(1, 2)
    return {Side.KEY: rotate(shaped[0].contiguous(), torch.arange(tokens), ROPE), Side.VALUE: shaped[1].contiguous()}


def gathered(tokens=1000, gradients=True, layers_per_block=3):
    statistics = KVStatistics(LAYOUT, ROPE, layers_per_block)
    kv = some_kv(tokens)
    statistics.add(kv)
    if gradients:
        scale = torch.rand((5, 1, 2, 8), generator=torch.Generator().manual_seed(9)) * 3
        statistics.add_gradients({side: some_kv(tokens, seed=5)[side] * scale for side in kv})
    return statistics, kv


def test_statistics_are_those_of_the_values_with_the_rotation_undone():
    statistics, kv = gathered()
    plain = unrotate(kv[Side.KEY], torch.arange(1000), ROPE)[3:].transpose(0, 1).flatten(1).double()
    assert torch.allclose(statistics.mean(Side.KEY, 1), plain.mean(0), atol=1e-5)
    assert torch.allclose(statistics.covariance(Side.KEY, 1), torch.cov(plain.T, correction=0), atol=1e-4)
    assert torch.allclose(
        statistics.mean(Side.VALUE, 0), kv[Side.VALUE][:3].transpose(0, 1).flatten(1).mean(0).double(), atol=1e-5
    )


def test_parts_add_up_wherever_they_are_cut():
    whole, kv = gathered(gradients=False)
    parts = KVStatistics(LAYOUT, ROPE, 3)
    for start, stop in ((0, 7), (7, 600), (600, 1000)):
        parts.add({side: values[:, start:stop] for side, values in kv.items()}, start)
    assert parts.tokens == whole.tokens
    assert torch.allclose(parts.covariance(Side.KEY, 0), whole.covariance(Side.KEY, 0), atol=1e-3)


def test_tokens_that_are_not_finite_are_left_out():
    statistics, kv = gathered(gradients=False)
    kv[Side.VALUE][2, 17, 1, 3] = float("nan")
    kv[Side.KEY][0, 400, 0, 0] = float("inf")
    other = KVStatistics(LAYOUT, ROPE, 3)
    other.add(kv)
    assert other.tokens == statistics.tokens - 2
    assert bool(torch.isfinite(other.covariance(Side.KEY, 0)).all())


def test_a_gradient_turns_back_so_that_it_predicts_the_same_change():
    """``g . dK`` must not depend on whether K is taken rotated or not, YaRN's factor included."""
    generator = torch.Generator().manual_seed(3)
    change, gradient = (torch.randn((1, 9, 1, 8), generator=generator) for _ in range(2))
    layout = ShardLayout(1, 1, 8)
    positions = torch.arange(100, 109)
    plain_change = unrotate(change, positions, ROPE)
    expected = (gradient * change).sum((0, 2, 3))
    # What was accumulated is the outer product of the turned gradients: rebuild them token by token.
    for token in range(9):
        one = KVStatistics(layout, ROPE, 1)
        part = gradient.clone()
        part[:, :token] = 0
        part[:, token + 1 :] = 0
        one.add_gradients({Side.KEY: part, Side.VALUE: part}, first_position=100)
        delta = plain_change[0, token, 0].double()
        assert float(delta @ (one.fisher(Side.KEY)[0, 0] * 9) @ delta) == pytest.approx(
            float(expected[token]) ** 2, rel=1e-4
        )


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_components_are_uncorrelated_and_the_metric_makes_the_basis_orthonormal(gradients, layers_per_block):
    statistics, _ = gathered(gradients=gradients, layers_per_block=layers_per_block)
    bases = solve_bases(statistics)
    assert bases.uses_gradients is gradients
    for side, blocks in bases.blocks.items():
        first = 0
        for index, block in enumerate(blocks):
            layers = len(block.mean) // LAYOUT.channels
            metric = torch.block_diag(*bases.metrics[side][first : first + layers].flatten(0, 1))
            synthesis = block.synthesis
            assert torch.allclose(
                synthesis @ metric @ synthesis.T, torch.eye(len(synthesis), dtype=torch.float64), atol=1e-6
            )
            analysis = metric @ synthesis.T
            covariance = analysis.T @ statistics.covariance(side, index) @ analysis
            assert torch.allclose(covariance, torch.diag(block.variances), atol=1e-6 * float(block.variances[0]))
            assert bool((block.variances.diff() <= 0).all())
            first += layers


def test_an_error_counts_by_what_the_gradients_say():
    """A head whose gradients are ten times larger gets errors ten times smaller."""
    statistics, kv = gathered(gradients=False, layers_per_block=1)
    scale = torch.ones(5, 1, 2, 1)
    scale[:, :, 1] = 10
    noise = torch.randn((5, 4000, 2, 8), generator=torch.Generator().manual_seed(1))
    statistics.add_gradients({side: noise * scale for side in kv})
    metric = solve_bases(statistics).metrics[Side.VALUE]
    powers = metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    shrunk = (100 + SHRINKAGE * 50.5) / (1 + SHRINKAGE * 50.5)
    assert powers[:, 1] / powers[:, 0] == pytest.approx(torch.full((5,), shrunk).double(), rel=0.15)


def test_too_few_tokens_are_refused():
    statistics, _ = gathered(tokens=100)
    with pytest.raises(CalibrationError, match="too few"):
        solve_bases(statistics)


def test_values_without_spread_are_refused():
    statistics = KVStatistics(LAYOUT, None, 3)
    statistics.add({side: torch.ones(5, 1000, 2, 8) for side in LAYOUT.sides})
    with pytest.raises(CalibrationError, match="spread"):
        solve_bases(statistics)


def test_first_tokens_that_matter_more_are_coded_finer():
    """A first token whose gradients are eleven times as large: steps of an eleventh, or the power of two below."""
    statistics, kv = gathered(gradients=False)
    weight = torch.ones(1, 1000, 1, 1)
    weight[:, 0] = 11
    noise = torch.randn((5, 1000, 2, 8), generator=torch.Generator().manual_seed(1))
    statistics.add_gradients({side: noise * weight for side in kv})
    assert statistics.start_gain() == 2.0**-4
    even = KVStatistics(LAYOUT, ROPE, 3)
    even.add_gradients(dict.fromkeys(kv, noise))
    assert even.start_gain() >= 0.5


def test_the_first_tokens_are_not_in_the_metric():
    statistics, kv = gathered(gradients=False)
    noise = torch.randn((5, 1000, 2, 8), generator=torch.Generator().manual_seed(1))
    loud = noise.clone()
    loud[:, :START_TOKENS] *= 1e3
    statistics.add_gradients(dict.fromkeys(kv, loud))
    even = KVStatistics(LAYOUT, ROPE, 3)
    even.add_gradients(dict.fromkeys(kv, noise))
    assert torch.equal(statistics.fisher(Side.VALUE), even.fisher(Side.VALUE))
