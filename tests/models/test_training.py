import pathlib

import numpy as np
import pytest
import torch
from tiny_lm.training import Plan, Trainer, orthogonal
from transformers import Qwen3Config, Qwen3ForCausalLM

PLAN = Plan(
    minutes=1e9,
    steps=5,
    sequences=3,
    sequence_tokens=17,
    prose_share=0.3,
    muon_rate=0.02,
    adam_rate=0.01,
    seed=7,
    checkpoint_s=0.0,
)
VOCABULARY = 13
STREAMS = {
    "code": (np.arange(997) % VOCABULARY).astype(np.uint16),
    "prose": (np.arange(499) * 5 % VOCABULARY).astype(np.uint16),
}


class Stop(Exception):
    pass


def small_model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def run(checkpoint: pathlib.Path, plan: Plan = PLAN, stop_at: int | None = None) -> tuple[Trainer, list[float]]:
    trainer, losses = Trainer(small_model(), plan, checkpoint), []

    def report(trainer: Trainer, loss: float) -> None:
        losses.append(loss)
        if trainer.steps == stop_at:
            raise Stop

    if stop_at:
        with pytest.raises(Stop):
            trainer.run(STREAMS, report)
    else:
        trainer.run(STREAMS, report)
    return trainer, losses


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path):
    whole, losses = run(tmp_path / "whole")
    _, before = run(tmp_path / "cut", stop_at=3)  # cut off after its third step, before that was saved
    resumed, after = run(tmp_path / "cut")
    assert before == losses[:3]
    assert after == losses[2:]
    assert resumed.steps == whole.steps == 5
    for (name, expected), (_, found) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert len(list((tmp_path / "cut").iterdir())) == 2


def test_training_lowers_the_loss(tmp_path):
    plan = Plan(1e9, 60, 4, 32, 0.5, 0.02, 0.01, 0, 1e9)
    trainer, losses = run(tmp_path, plan)
    assert losses[0] == pytest.approx(np.log(VOCABULARY), abs=0.4)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert trainer.progress == 1


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    run(tmp_path)
    other = Plan(1e9, 5, 3, 17, 0.3, 0.02, 0.01, 8, 0.0)
    with pytest.raises(ValueError, match="is of another plan"):
        Trainer(small_model(), other, tmp_path)


@pytest.mark.parametrize("shape", [(31, 7), (7, 31), (13, 13), (1, 5)])
def test_a_step_of_muon_is_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert found.shape == shape
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.95
