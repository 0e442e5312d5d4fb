"""Models whose layers are of different kinds: what can be coded of them, and what SGLang must be told for it."""

from __future__ import annotations

import logging
from typing import Any

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.plugin.settings import BACKEND_NAME

logger = logging.getLogger(__name__)

_SLIDING_LAYERS_KEPT = (
    "kvcodec: --disable-hybrid-swa-memory set, so that a stored prefix is whole: the %s layers of this model that have "
    "a sliding window keep the KV of every token, as the others do, and the KV cache holds fewer tokens for it"
)
_STATE_REFUSED = (
    "kvcodec can't code a model with state-space or linear-attention layers: a prefix can't be taken up again without "
    "their state, which is not stored, so that nothing would be saved"
)


def suit_layer_kinds(server_args: Any) -> None:
    """Settles what SGLang is told on account of the model's layers; for any server without kvcodec, nothing.

    A prefix is worth nothing without all that the model keeps of it. A layer with a sliding window can keep the KV of
    every token, in one pool with the others; SGLang can do so and masks what is outside the window. A recurrent state
    belongs to the end of one prefix alone and isn't paged, so its model is refused.

    Args:
        server_args: while SGLang resolves them, from where the model's configuration can be read.

    Raises:
        UnsupportedError: a model of which nothing can be coded that would save a prefill.
    """
    if getattr(server_args, "radix_cache_backend", None) != BACKEND_NAME:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.connector import ConnectorType
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state
    from sglang.srt.utils import parse_connector_type

    if parse_connector_type(server_args.model_path) == ConnectorType.INSTANCE:
        # Another server has the configuration; what is built is looked at later.
        return
    model = model_config_of(server_args)
    check_layer_kinds(model, has_state=uses_ssm_state(model))
    if not model.is_hybrid_swa:
        return
    declare_resolution(server_args, "kvcodec", disable_hybrid_swa_memory=True)
    # It was read with the flag as it was.
    server_args._model_config = None
    logger.warning(_SLIDING_LAYERS_KEPT, len(model.swa_attention_layer_ids or ()) or "many")


def check_layer_kinds(model: Any, has_state: bool) -> None:
    """Refuses a model of which nothing can be coded that would save a prefill.

    Args:
        model: SGLang's ``ModelConfig``.
        has_state: whether some of its layers keep a state instead of KV.

    Raises:
        UnsupportedError: in one sentence.
    """
    if has_state:
        raise UnsupportedError(_STATE_REFUSED)
    if not model.is_hybrid_swa:
        return
    from sglang.srt.configs.model_config import AttentionArch

    kinds_differ = (
        # Compressed caches, and families whose kinds of layers SGLang can't put into one pool.
        getattr(model, "is_deepseek_v4_arch", False)
        or model.is_hybrid_swa_compress
        or model.attention_arch is AttentionArch.MLA
        or (model.swa_head_dim, model.swa_v_head_dim) != (model.head_dim, model.v_head_dim)
        or model.get_swa_num_kv_heads(1) != model.get_num_kv_heads(1)
    )
    if kinds_differ:
        raise UnsupportedError(
            "kvcodec can't code a model whose sliding-window layers have KV of another shape than its other layers"
        )


def check_built_kinds(is_hybrid_swa: bool, is_hybrid_ssm: bool) -> None:
    """Refuses what SGLang has built after all, whatever the configuration said.

    Args:
        is_hybrid_swa: layers with a sliding window have a pool of their own.
        is_hybrid_ssm: layers have a state.

    Raises:
        UnsupportedError: in one sentence.
    """
    if is_hybrid_ssm:
        raise UnsupportedError(_STATE_REFUSED)
    if is_hybrid_swa:
        raise UnsupportedError(
            "kvcodec can't code sliding-window layers that have a KV pool of their own, only with "
            "--disable-hybrid-swa-memory"
        )
