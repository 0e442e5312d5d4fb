"""Makes ``real_kv.npz``: KV of the test model and calibrations for it, so that a GPU is measured with real pictures.

``python -m benchmarks.gpu.make_real_kv`` in a checkout; needs transformers, which the benchmark itself does not. It
takes layers 3 to 5 of the first of two tensor-parallel ranks: one KV head of 128, three layers, one picture a side.
The calibrations are those that a server makes of what it publishes (``calibration/by_noise.py``), with a basis per
layer and one over three, from text that the pages are not from. The pages are kept as ``exact`` page objects.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch

from benchmarks.gpu.real_kv import DOCUMENTS, PAGES, PATH, SPEC, as_bytes
from sglang_kvcodec.calibration.by_noise import calibrate_by_noise
from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.evaluation.text import cut_documents, shipped_texts
from sglang_kvcodec.flow.page_codec import PageEncoder
from sglang_kvcodec.format.calibration import Calibration, ShardLayout
from sglang_kvcodec.format.rope import rope_spec_from_config
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_encoder

MODEL = pathlib.Path(__file__).parents[2] / "tests/models/tiny-code-lm"
FIRST_LAYER = 3
CALIBRATION_DOCUMENTS, CALIBRATION_TOKENS = 40, 512


def own_part(kv: dict) -> dict:
    """Of the whole model's KV, the layers and the head that are kept."""
    layers = slice(FIRST_LAYER, FIRST_LAYER + SPEC.layers)
    return {side: values[layers, :, :1].contiguous() for side, values in kv.items()}


def calibrate(model: CausalLM, layers_per_block: int) -> Calibration:
    layout = ShardLayout(SPEC.layers, 1, SPEC.head_dim, first_layer=FIRST_LAYER, tp_size=2)
    statistics = KVStatistics(layout, rope_spec_from_config(model.config), layers_per_block)
    sample = []
    texts = shipped_texts("calibration")
    for document in cut_documents(texts, model.encode, CALIBRATION_TOKENS, CALIBRATION_DOCUMENTS):
        kv = own_part(model.prefill(document.tokens))
        statistics.add(kv)
        if len(sample) < 4:
            sample.append((kv, 0))
    return calibrate_by_noise(statistics, sample, bytes(32), {"model": "tests/models/tiny-code-lm"})


def main() -> None:
    torch.manual_seed(0)
    model = CausalLM.load(MODEL)
    arrays = {f"calibration_{layers}": as_bytes(calibrate(model, layers).encoded) for layers in (1, 3)}
    encoder = PageEncoder(bytes(32), PageTransforms(SPEC, "exact"), open_encoder())
    tokens = PAGES * SPEC.page_tokens
    for number, document in enumerate(
        cut_documents(shipped_texts("evaluation", ["code"]), model.encode, tokens, DOCUMENTS)
    ):
        kv = own_part(model.prefill(document.tokens))
        for page in range(PAGES):
            part = slice(page * SPEC.page_tokens, (page + 1) * SPEC.page_tokens)
            values = {side: each[:, part].contiguous() for side, each in kv.items()}
            page_hash = bytes([number, page]) + bytes(30)
            arrays[f"page_{number}_{page}"] = as_bytes(encoder.encode(page_hash, values))
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size / 1e6:.2f} MB, {DOCUMENTS} documents of {PAGES} pages")


if __name__ == "__main__":
    main()
