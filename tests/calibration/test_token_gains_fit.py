"""Models of gains: fitted where tokens differ, absent where they do not."""

import pytest
import torch
from test_bases import LAYOUT, ROPE, gathered

from sglang_kvcodec.calibration.bases import solve_bases
from sglang_kvcodec.calibration.statistics import START_TOKENS
from sglang_kvcodec.calibration.tiers import to_components
from sglang_kvcodec.calibration.token_gains import fit_gain_models, gains_of, over_gains, token_sample, usual_tokens
from sglang_kvcodec.format.spec import Side


def samples(seeds, weight_of):
    """Documents whose gradients are noise times what ``weight_of`` makes of the first channel of V."""
    statistics, _ = gathered(gradients=True, tokens=3000)
    bases = solve_bases(statistics)
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        kv = {side: torch.randn((5, 900, 2, 8), generator=generator) for side in LAYOUT.sides}
        # One token in fifty sticks out.
        sink = torch.rand(900, generator=generator) < 0.02
        kv[Side.VALUE][:, sink] += 6.0
        weight = weight_of(sink)[None, :, None, None]
        gradients = [
            {side: torch.randn((5, 900, 2, 8), generator=generator) * weight for side in LAYOUT.sides} for _ in range(2)
        ]
        components = to_components(statistics, bases, kv)
        made.append((token_sample(statistics, bases, components, gradients), components, sink))
    return bases, made


def test_tokens_that_stick_out_and_matter_get_smaller_steps():
    bases, made = samples(range(6), lambda sink: 1.0 + 15.0 * sink)
    step = 0.3 * float(made[0][1].values[Side.VALUE][0].std())
    models = fit_gain_models(bases, [sample for sample, _, _ in made], step)
    _, components, sink = made[1]
    gains = gains_of(bases, models, components)[Side.VALUE][0]
    assert float(gains[sink].log2().mean()) < float(gains[~sink].log2().mean()) - 1.5
    scaled = over_gains(components, {side: [gains] * 2 for side in LAYOUT.sides})
    assert torch.allclose(scaled.values[Side.KEY][1] * gains[:, None], components.values[Side.KEY][1], rtol=1e-5)


def test_tokens_that_stick_out_and_do_not_matter_get_the_steps_of_others():
    bases, made = samples(range(6), lambda sink: torch.ones(len(sink)))
    step = 0.3 * float(made[0][1].values[Side.VALUE][0].std())
    models = fit_gain_models(bases, [sample for sample, _, _ in made], step)
    _, components, sink = made[1]
    gains = gains_of(bases, models, components)[Side.VALUE][0].log2()
    assert abs(float(gains[sink].mean() - gains[~sink].mean())) < 0.4


@pytest.mark.parametrize("count", [0, 1])
def test_without_documents_to_judge_by_there_are_no_gains(count):
    bases, made = samples(range(count), lambda sink: 1.0 + sink)
    models = fit_gain_models(bases, [sample for sample, _, _ in made], 1.0)
    assert set(models) == set(LAYOUT.sides)
    assert all(len(model.scales) == 0 for of_side in models.values() for model in of_side)


def test_a_block_of_which_the_samples_tell_nothing_has_no_gains():
    """As of layers with a window that ends before the sampled tokens."""
    bases, made = samples(range(6), lambda sink: 1.0 + 15.0 * sink)
    for sample, _, _ in made:
        sample.sensitivity[Side.VALUE][1].zero_()
    step = 0.3 * float(made[0][1].values[Side.VALUE][0].std())
    models = fit_gain_models(bases, [sample for sample, _, _ in made], step)
    assert [len(model.scales) > 0 for model in models[Side.VALUE]] == [True, False]


def test_documents_of_a_token_or_two_teach_no_gains():
    statistics, kv = gathered(gradients=True, tokens=3000)
    bases = solve_bases(statistics)
    short = {side: values[:, :64] for side, values in kv.items()}
    sample = token_sample(statistics, bases, to_components(statistics, bases, short), [short])
    assert sample.tokens == 1
    models = fit_gain_models(bases, [sample] * 4, 1.0)
    assert all(len(model.scales) == 0 for of_side in models.values() for model in of_side)


def test_first_tokens_are_left_out():
    assert ROPE is not None
    _, made = samples([1], lambda sink: 1.0 + sink)
    usual = usual_tokens(made[0][1]).values[Side.KEY][0]
    assert torch.equal(usual, made[0][1].values[Side.KEY][0][START_TOKENS:])
