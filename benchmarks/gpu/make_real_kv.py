"""Makes ``real_kv.npz``: KV of the test model and calibrations for it, so that a GPU is measured with real pictures.

``python -m benchmarks.gpu.make_real_kv`` in a checkout; needs transformers, which the benchmark itself does not. It
takes layers 3 to 5 of the first of two tensor-parallel ranks: one KV head of 128, three layers, one picture a side.
The calibrations are those parts of what ``kvcodec calibrate`` makes of the model, by default but for the two ranks,
with a basis per layer and one over three, from text that the pages are not from. The pages are kept as ``exact`` page
objects. Some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch

from benchmarks.gpu.real_kv import DOCUMENTS, PAGES, PATH, SPEC, as_bytes
from sglang_kvcodec.evaluation.calibrate import CalibrationPlan, calibrate
from sglang_kvcodec.evaluation.text import cut_documents, shipped_texts
from sglang_kvcodec.flow.page_codec import PageEncoder
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_encoder

MODEL = pathlib.Path(__file__).parents[2] / "tests/models/tiny-code-lm"
FIRST_LAYER = 3
CALIBRATION_DOCUMENTS = 40


def own_part(kv: dict) -> dict:
    """Of the whole model's KV, the layers and the head that are kept."""
    layers = slice(FIRST_LAYER, FIRST_LAYER + SPEC.layers)
    return {side: values[layers, :, :1].contiguous() for side, values in kv.items()}


def calibrated(model: CausalLM, layers_per_block: int) -> Calibration:
    """Of the first of two ranks, the layers that are kept."""
    plan = CalibrationPlan(layers_per_block=layers_per_block, tp_size=2)
    documents = cut_documents(shipped_texts("calibration"), model.encode, plan.document_tokens, CALIBRATION_DOCUMENTS)
    whole = calibrate(model, model_files_digest(MODEL), documents, plan, {"model": MODEL.name})[0]
    kept = [
        index
        for index, (first, layers) in enumerate(whole.blocks())
        if first >= FIRST_LAYER and first + layers <= FIRST_LAYER + SPEC.layers
    ]
    blocks = slice(kept[0], kept[-1] + 1)
    layout = dataclasses.replace(whole.layout, first_layer=FIRST_LAYER, layers=SPEC.layers)
    return dataclasses.replace(
        whole,
        layout=layout,
        bases={side: bases[blocks] for side, bases in whole.bases.items()},
        metrics={side: each[FIRST_LAYER : FIRST_LAYER + SPEC.layers] for side, each in whole.metrics.items()},
        gain_models={side: models[blocks] for side, models in whole.gain_models.items()},
        tiers={
            name: dataclasses.replace(
                tier,
                steps={side: steps[blocks] for side, steps in tier.steps.items()},
                low_bits={side: bits[blocks] for side, bits in tier.low_bits.items()},
            )
            for name, tier in whole.tiers.items()
        },
    )


def main() -> None:
    torch.manual_seed(0)
    model = CausalLM.load(MODEL)
    arrays = {f"calibration_{layers}": as_bytes(calibrated(model, layers).encoded) for layers in (1, 3)}
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
