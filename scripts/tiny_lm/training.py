"""Trains the test model: Muon for the matrices, AdamW for the rest, a learning rate that falls to zero with time."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from .loss import nats

WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is asked to do.

    Attributes:
        minutes: of training, those before a resume included.
        steps: at most so many; None: as many as the time allows.
        sequences: per step.
        sequence_tokens: per sequence.
        prose_share: of the sequences.
        muon_rate: peak learning rate of matrices: the spectral norm of a step.
        adam_rate: of the embedding and the norms.
        seed: of initial weights and of the order of the data.
        checkpoint_s: seconds between checkpoints.
    """

    minutes: float
    steps: int | None
    sequences: int
    sequence_tokens: int
    prose_share: float
    muon_rate: float
    adam_rate: float
    seed: int
    checkpoint_s: float


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).

    torch has one, but it iterates in bf16, for which most CPUs have no units; this one does it in float32.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
                rows, columns = parameter.shape
                parameter.add_(orthogonal(direction), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Near U V^T of the SVD of a ``(rows, columns)`` matrix: five Newton-Schulz steps with Jordan's coefficients."""
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return result


def architecture(vocabulary: int) -> Qwen3Config:
    """RoPE, grouped queries, normalised Q and K, heads of 128: what the codec meets in models of use, but small."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=2,
    )


class Trainer:
    """One model in training, with a checkpoint directory that a later run takes up again."""

    def __init__(self, model: Qwen3ForCausalLM, plan: Plan, checkpoint: pathlib.Path) -> None:
        """Takes up the checkpoint if there is one.

        Args:
            model: float32.
            plan: what to do.
            checkpoint: directory, made if missing.

        Raises:
            ValueError: the checkpoint was made under another plan (more minutes or steps are no other plan).
        """
        self.model, self.plan, self._checkpoint = model, plan, checkpoint
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
        self._optimizers = [
            Muon(matrices, plan.muon_rate),
            torch.optim.AdamW(others, plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._rates = [plan.muon_rate, plan.adam_rate]
        self.steps, self.seconds = 0, 0.0
        if (checkpoint / "state.json").exists():
            self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end: by time, or by steps where they are bounded and further on."""
        by_steps = self.steps / self.plan.steps if self.plan.steps else 0.0
        return min(max(self.seconds / (60 * self.plan.minutes), by_steps), 1.0)

    def run(
        self,
        streams: Mapping[str, npt.NDArray[np.uint16]],
        report: Callable[[Trainer, float], None],
    ) -> None:
        """Trains until time or steps are used up, then saves a last checkpoint.

        Args:
            streams: ``code`` and ``prose``, ``(tokens,)`` each.
            report: called after each step with its loss in nats.
        """
        saved = time.monotonic()
        self.model.train()
        while self.progress < 1:
            started = time.monotonic()
            loss = self._step(self._batch(streams))
            self.steps += 1
            self.seconds += time.monotonic() - started
            report(self, loss)
            if time.monotonic() - saved > self.plan.checkpoint_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def validation(self, documents: Iterable[npt.NDArray[np.uint16]]) -> float:
        """Nats per token."""
        self.model.train(False)
        losses = np.concatenate(nats(self.model, list(documents)))
        self.model.train()
        return float(losses.mean())

    def _batch(self, streams: Mapping[str, npt.NDArray[np.uint16]]) -> torch.Tensor:
        """``(sequences, sequence_tokens + 1)`` ids; a function of seed and step alone, so that a resume goes on."""
        random = np.random.default_rng((self.plan.seed, self.steps))
        rows = []
        for _ in range(self.plan.sequences):
            stream = streams["prose" if random.random() < self.plan.prose_share else "code"]
            start = int(random.integers(len(stream) - self.plan.sequence_tokens))
            rows.append(stream[start : start + self.plan.sequence_tokens + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def _step(self, batch: torch.Tensor) -> float:
        left = (1 - self.progress) / (1 - WARMUP)
        rate = min(left, (self.progress + 0.002) / WARMUP, 1.0)
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def save(self) -> None:
        """Weights, optimizer states and the count of steps; a checkpoint is replaced whole or not at all."""
        tensors: dict[str, torch.Tensor] = {f"model/{name}": p for name, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self._optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer{number}/{index}/{key}"] = torch.as_tensor(value)
        self._checkpoint.mkdir(parents=True, exist_ok=True)
        name = f"step-{self.steps}.safetensors"
        save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, self._checkpoint / name)
        state = {"tensors": name, "steps": self.steps, "seconds": self.seconds, "plan": self._identity()}
        partial = self._checkpoint / "state.json.partial"
        partial.write_text(json.dumps(state) + "\n")
        os.replace(partial, self._checkpoint / "state.json")
        for old in self._checkpoint.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _load(self) -> None:
        state = json.loads((self._checkpoint / "state.json").read_text())
        if state["plan"] != self._identity():
            raise ValueError(f"{self._checkpoint} is of another plan: {state['plan']}, not {self._identity()}")
        self.steps, self.seconds = state["steps"], state["seconds"]
        tensors = load_file(self._checkpoint / state["tensors"])
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(tensors[f"model/{name}"])
        for number, optimizer in enumerate(self._optimizers):
            whole = optimizer.state_dict()
            whole["state"] = {}
            for key, tensor in tensors.items():
                part, _, rest = key.partition("/")
                if part == f"optimizer{number}":
                    index, _, name = rest.partition("/")
                    whole["state"].setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict(whole)

    def _identity(self) -> dict[str, object]:
        """What must not change between the runs of one training."""
        return {
            key: value
            for key, value in dataclasses.asdict(self.plan).items()
            if key not in ("minutes", "steps", "checkpoint_s")
        }
