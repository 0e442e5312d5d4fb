"""How a rank comes by its calibration: asked for at start, or made while it serves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.flow.auto_calibration import LAYERS_PER_BLOCK, AutoCalibration
from sglang_kvcodec.flow.calibrations import search_calibration, settle_calibration
from sglang_kvcodec.format.calibration import Calibration, ShardLayout, model_digest
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.format.rope import RopeSpec, rope_spec_from_config
from sglang_kvcodec.format.spec import KVSpec
from sglang_kvcodec.plugin.model_path import local_model_path
from sglang_kvcodec.plugin.runtime import NewAutoCalibration
from sglang_kvcodec.rpc.connect import connect
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)


def shard_layout(ctx: Any, spec: KVSpec) -> ShardLayout:
    """The part of the model's KV that this rank holds; ``ctx`` is SGLang's ``TreeCacheBuildContext``."""
    first_layer = ctx.params.token_to_kv_pool_allocator.get_kvcache().start_layer or 0
    return ShardLayout(
        spec.layers, spec.kv_heads, spec.head_dim, first_layer, ctx.tp_rank, ctx.tp_size, sides=spec.sides
    )


def rank_digest(ctx: Any, spec: KVSpec) -> bytes:
    """Names the model and shard of this rank, as ``kvcodec calibrate`` names it.

    Raises:
        ConfigurationError: the model's files can't be found.
        OSError: they can't be read.
    """
    return model_digest(model_files_digest(local_model_path(ctx.server_args)), shard_layout(ctx, spec))


def calibration_at_start(
    ctx: Any, config: ServerConfig, transforms: PageTransforms, all_ranks: Callable[[bool], bool]
) -> Calibration | None:
    """The calibration that this server starts with; None if its tier needs none, or for want of one.

    Args:
        ctx: SGLang's ``TreeCacheBuildContext``.
        config: the operator's settings.
        transforms: learn it.
        all_ranks: see ``settle_calibration``.
    """
    if not set(config.tiers) & set(CALIBRATED_TIERS):
        return None
    timeouts = dataclasses.replace(config.timeouts, calibration_s=config.timeouts.start_calibration_s)
    with contextlib.closing(connect(config.remote, timeouts, config.replicas, config.access)) as peer:
        found = search_calibration(peer, lambda: rank_digest(ctx, transforms.spec), transforms)
    return settle_calibration(found, transforms, all_ranks)


def auto_calibration(ctx: Any, config: ServerConfig, transforms: PageTransforms) -> NewAutoCalibration | None:
    """What makes a calibration while this server serves; None where it was not asked for, or the model has no name."""
    if not config.auto_calibrate:
        return None
    try:
        digest = rank_digest(ctx, transforms.spec)
    except (ConfigurationError, OSError) as error:
        logger.warning("kvcodec: no calibration can be made: %s", error)
        return None

    def new(peer: PeerTransport, on_calibration: Callable[[Calibration], None]) -> AutoCalibration:
        statistics = KVStatistics(shard_layout(ctx, transforms.spec), _rope(ctx, transforms.spec), LAYERS_PER_BLOCK)
        return AutoCalibration(peer, config.timeouts.retry_s, statistics, digest, transforms, on_calibration)

    return new


def _rope(ctx: Any, spec: KVSpec) -> RopeSpec | None:
    """The rotation of the model's K; None, and said, where it is not understood."""
    config = getattr(ctx.model_config, "hf_text_config", ctx.model_config.hf_config)
    try:
        return rope_spec_from_config(config.to_dict(), head_dim=spec.head_dim)
    except UnsupportedError as error:
        logger.warning("kvcodec: K will be coded with its rotation: %s", error)
        return None
