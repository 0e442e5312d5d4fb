"""Calibrations of the test model, made in seconds: covariances of a little text, no gradients, no search."""

import functools
import pathlib

from integration.cluster import MODEL

from sglang_kvcodec.calibration.by_noise import calibrate_by_noise
from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.format.calibration import Calibration, ShardLayout, model_digest
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.format.rope import rope_spec_from_config
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.testing.conversation import source_slices

FINE = {"high": 1e-4, "balanced": 3e-4}
"""A tenth of the noise that a tier may add, so that the few words of a test are those of untouched KV."""
_RUN_TOKENS = 512


@functools.cache
def calibrations(tp_size: int = 1, tiers: tuple[str, ...] = ("high",)) -> tuple[Calibration, ...]:
    """One for each rank."""
    model = CausalLM.load(MODEL)
    spec = model.kv_spec(64)
    layouts = [
        ShardLayout(spec.layers, spec.kv_heads // tp_size, spec.head_dim, tp_rank=rank, tp_size=tp_size)
        for rank in range(tp_size)
    ]
    shards = [KVStatistics(layout, rope_spec_from_config(model.config), 3) for layout in layouts]
    samples = [[] for _ in layouts]
    for text in source_slices([2200] * 8, "ast"):
        kv = model.prefill(model.encode(text)[:_RUN_TOKENS])
        for shard, sample in zip(shards, samples, strict=True):
            shard.add(shard.own(kv))
            sample.append((shard.own(kv), 0))
    fine = {tier: FINE[tier] for tier in tiers}
    files = model_files_digest(pathlib.Path(MODEL))
    return tuple(
        calibrate_by_noise(shard, sample[:2], model_digest(files, shard.layout), {"model": "test"}, fine)
        for shard, sample in zip(shards, samples, strict=True)
    )
