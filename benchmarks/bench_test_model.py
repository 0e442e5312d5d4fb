"""Next-token loss of the test model against a 5-gram model, on text of packages that neither has seen.

Both see the same tokens, and the 5-gram model (interpolated modified Kneser-Ney) is trained on all the text that the
test model was trained from. ``original`` are the packages of the model's first training, ``all`` those that its
script reads.

``python benchmarks/bench_test_model.py --data DIR [--model PATH ...]``, where ``DIR`` is ``data/`` of
``scripts/train-test-model --output`` with the models' tokenizer; it is made if it isn't there.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import numpy.typing as npt
import torch
from record import record
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_lm import corpus  # noqa: E402
from tiny_lm.dataset import KINDS, Dataset  # noqa: E402
from tiny_lm.kneser_ney import KneserNey  # noqa: E402
from tiny_lm.loss import nats  # noqa: E402

MODEL = REPOSITORY / "tests/models/tiny-code-lm"
ORDERS = (1, 5)
Losses = list[npt.NDArray[np.float64]]


def lengths_bytes(documents: list[npt.NDArray[np.uint16]], tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of each document; its first token, which only marks the beginning, has none."""
    texts = tokenizer.decode_batch([ids[1:].tolist() for ids in documents], skip_special_tokens=False)
    return [len(text.encode()) for text in texts]


def row(method: str, kind: str, losses: Losses, sizes: list[int], baseline: Losses) -> dict[str, object]:
    """Means, and the difference to the baseline with a 95 % interval over documents, which are what varies."""
    tokens = sum(map(len, losses))
    per_document = np.array([own.sum() - other.sum() for own, other in zip(losses, baseline, strict=True)])
    counts = np.array([len(own) for own in losses])
    difference = per_document.sum() / tokens
    spread = np.sqrt(((per_document - difference * counts) ** 2).sum()) / tokens
    total = float(sum(own.sum() for own in losses))
    return {
        "method": method,
        "text": kind,
        "documents": len(losses),
        "tokens": tokens,
        "bytes": sum(sizes),
        "nats_per_token": round(total / tokens, 4),
        "bits_per_byte": round(total / np.log(2) / sum(sizes), 4),
        "nats_below_5gram": round(-float(difference), 4),
        "nats_below_5gram_95": round(1.96 * float(spread), 4),
        "ratio_to_5gram": round(total / float(sum(other.sum() for other in baseline)), 4),
        "nats_per_token_by_position": {
            f"{start}-{start + 256}": round(
                float(np.concatenate([own[start : start + 256] for own in losses]).mean()), 4
            )
            for start in range(0, max(map(len, losses)), 256)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, action="append", help=f"default: {MODEL.relative_to(REPOSITORY)}")
    parser.add_argument("--label", action="append", help="one for each --model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    paths = arguments.model or [MODEL]
    labels = arguments.label or [path.name for path in paths]
    torch.set_num_threads(arguments.threads)
    tokenizer = Tokenizer.from_file(str(paths[0] / "tokenizer.json"))
    data = Dataset(arguments.data)
    if not data.is_made:
        data.make(tokenizer)
    held_out = {kind: list(data.documents("held-out", kind).values()) for kind in KINDS}
    sizes = {kind: lengths_bytes(documents, tokenizer) for kind, documents in held_out.items()}

    measured: dict[tuple[str, str], Losses] = {}
    for name, sources in (("original", corpus.ORIGINAL), ("all", corpus.TRAINING)):
        stream = np.concatenate([data.stream(kind, sources) for kind in KINDS])
        for order in ORDERS:
            model = KneserNey(stream, order, tokenizer.get_vocab_size())
            for kind, documents in held_out.items():
                measured[f"{order}-gram, {name} text ({len(stream)} tokens)", kind] = [
                    -np.log(model.probabilities(ids)[1:]) for ids in documents
                ]
    strict = next(key for key, _ in measured if key.startswith("5-gram, all"))
    for label, path in zip(labels, paths, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train(False)
        for kind, documents in held_out.items():
            with tqdm(total=len(documents), desc=f"{label}, {kind}", mininterval=5) as bar:
                measured[label, kind] = nats(model, documents, bar.update)

    rows = [
        row(method, kind, losses, sizes[kind], measured[strict, kind]) for (method, kind), losses in measured.items()
    ]
    for line in rows:
        print(
            f"{line['method']:45} {line['text']:6} {line['nats_per_token']:.3f} nats,"
            f" {line['bits_per_byte']:.3f} bit/byte,"
            f" {line['nats_below_5gram']:.3f} +- {line['nats_below_5gram_95']:.3f} nats below the 5-gram model"
        )
    print(record("test-model", rows))


if __name__ == "__main__":
    main()
