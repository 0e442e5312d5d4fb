import math

import pytest
import torch
from test_bases import LAYOUT, ROPE, gathered

from sglang_kvcodec.calibration.bases import solve_bases
from sglang_kvcodec.calibration.tiers import (
    Components,
    best_rounding,
    bits_and_noise,
    build_calibration,
    coded_components,
    ideal_bits,
    make_tier,
    search_step,
    to_components,
)
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.transform.klt import KltTransform


def test_ideal_bits_are_the_entropy_of_each_component_alone():
    codes = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]])
    assert ideal_bits(codes) == pytest.approx(4 * 2.0)


def test_the_noise_of_fine_steps_is_a_twelfth_of_their_square():
    values = torch.randn((4000, 3), generator=torch.Generator().manual_seed(1)) * 5
    bits, noise = bits_and_noise(Components({Side.KEY: [values]}), 0.5, 0.5)
    assert noise == pytest.approx(0.5**2 / 12, rel=0.05)
    assert bits == pytest.approx(math.log2(5 * math.sqrt(2 * math.pi * math.e) / 0.5), abs=0.1)


def test_rounding_towards_zero_pays_for_small_components_only():
    generator = torch.Generator().manual_seed(1)
    small = Components({Side.KEY: [torch.randn((4000, 8), generator=generator) * 0.5]})
    large = Components({Side.KEY: [torch.randn((4000, 8), generator=generator) * 50]})
    assert best_rounding(small, 1.0) < 0.5
    assert best_rounding(large, 1.0) == 0.5


def test_components_that_code_to_nothing_are_cut_and_wide_ones_give_up_bits():
    scales = torch.tensor([40.0, 4.0, 1.0, 0.05, 0.001])
    block = torch.randn((8000, 5), generator=torch.Generator().manual_seed(1)) * scales
    assert coded_components(block, 1.0, 0.5).tolist() == [4, 1, 0]
    assert coded_components(block * 0, 1.0, 0.5).tolist() == [0]


@pytest.mark.parametrize("power", [1.4, 2.0, 2.7])
@pytest.mark.parametrize("first", [1e-3, 0.1, 1e3])
def test_the_search_finds_the_step_from_anywhere(power, first):
    trials = []

    def divergence(step):
        trials.append(step)
        return 3e-4 * step**power

    step, found = search_step(divergence, 1e-4, first)
    assert 0.85e-4 <= found <= 1e-4
    assert found == divergence(step)
    assert len(trials) <= 12


def test_a_search_that_finds_nothing_good_gives_the_finest():
    step, found = search_step(lambda step: 1.0, 1e-4, 1.0)
    assert step < 1
    assert found == 1.0


def test_a_search_goes_on_where_a_finer_step_happens_to_be_no_better():
    measured = {1.0: 1.2e-4}
    step, found = search_step(lambda step: measured.get(step, 1.21e-4 if step > 0.8 else 0.9e-4), 1e-4, 1.0)
    assert found <= 1e-4
    assert step < 0.8


def test_a_search_with_a_jump_stays_below_it():
    step, found = search_step(lambda step: 1e-6 if step < 2 else 1.0, 1e-4, 1.0)
    assert found == 1e-6
    assert 1 <= step < 2


def test_a_calibration_made_of_statistics_codes_what_it_was_made_of():
    """Statistics, bases, tier, artifact, transform: the noise in the artifact's metric is what the tier's step says."""
    statistics, kv = gathered(tokens=2000)
    bases = solve_bases(statistics)
    components = to_components(statistics, bases, kv)
    step = 0.02 * math.sqrt(float(components.values[Side.VALUE][0].square().mean()))
    tiers = {"high": make_tier(bases, components, step, 0.5)}
    made = build_calibration(bytes(32), LAYOUT, ROPE, 3, bases, tiers, {})
    calibration = Calibration.from_bytes(made.encoded)
    spec = KVSpec(5, 2, 8, 100, KVDtype.FLOAT16)
    transform = KltTransform(spec, calibration, "high")
    group = layer_groups(spec)[0]
    for side, values in kv.items():
        pages = torch.stack(torch.split(values, 100, dim=1)).to(torch.float16)
        positions = [100 * page for page in range(20)]
        restored = transform.restore(group, side, transform.pack(group, side, pages, positions), positions)
        error = (restored.float() - pages.float()).transpose(0, 1).flatten(1, 2)
        turned = statistics.unrotated(side, error, 0).double()
        metric = bases.metrics[side] / bases.blocks[side][0].unit ** 2
        noise = float(torch.einsum("lthd,lhde,lthe->", turned[:3], metric[:3], turned[:3])) / (2000 * 48)
        assert noise == pytest.approx(step**2 / 12, rel=0.25)
