"""Next-token loss of a causal language model on documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel


def nats(
    model: PreTrainedModel,
    documents: Sequence[npt.NDArray[np.integer]],
    progress: Callable[[int], object] = lambda more: None,
) -> list[npt.NDArray[np.float64]]:
    """-log P of every token of each document but its first: ``(tokens,)`` ids -> ``(tokens - 1,)`` float64.

    A document is one forward pass: a token sees all of its document that stands before it.

    Args:
        model: in float32; bf16 on a CPU without bf16 units is slow, and bf16 weights lose nothing by it.
        documents: each at least two tokens, at most what the model's positions allow.
        progress: told 1 after each document.
    """
    losses = []
    for ids in documents:
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(input_ids=batch).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none").double().numpy())
        progress(1)
    return losses
