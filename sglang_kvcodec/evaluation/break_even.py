"""When fetching coded KV is faster than fetching it uncoded, and than computing it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.spec import KVDtype, KVSpec

RAW_BITS = 16
"""Of a value in a bf16 or fp16 pool."""


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """What follows from the rates, all of which are taken to overlap: the slowest stage bounds a fetch.

    Attributes:
        values_per_token: of all layers, K and V.
        fetch_tokens_per_s: of a long prefix; None without a link that was measured.
        bound_by: ``"link"``, ``"decode"`` or ``"restore"``.
        codec_beats_raw_below_bits_per_s: on a faster link uncoded KV arrives sooner than coded KV is decoded.
        min_tokens: a shorter prefix is computed sooner than fetched; None if it always is, or if that can't be known.
        why_no_min_tokens: the reason for None.
    """

    values_per_token: int
    fetch_tokens_per_s: float | None
    bound_by: str | None
    codec_beats_raw_below_bits_per_s: float
    min_tokens: int | None
    why_no_min_tokens: str


def break_even(
    values_per_token: int,
    bits_per_value: float,
    decode_values_per_s: float,
    restore_values_per_s: float | None,
    link_bits_per_s: float | None,
    latency_s: float,
    prefill_tokens_per_s: float | None,
) -> BreakEven:
    """The break-even of one rank's pool and one peer.

    Args:
        values_per_token: of all layers, K and V, of the rank.
        bits_per_value: coded.
        decode_values_per_s: samples of pictures, of all decoders together.
        restore_values_per_s: of all restoring threads together; None if it was not measured, then it does not bound.
        link_bits_per_s: from the peer; None if it was not measured.
        latency_s: of a round trip: a fetch takes two, the Lookup's and its own.
        prefill_tokens_per_s: of the server without kvcodec; taken to be the same for every length.
    """
    rates = {"decode": decode_values_per_s}
    if restore_values_per_s is not None:
        rates["restore"] = restore_values_per_s
    device_values_per_s = min(rates.values())
    if link_bits_per_s is not None:
        rates["link"] = link_bits_per_s / bits_per_value
    bound_by, values_per_s = min(rates.items(), key=lambda item: item[1])
    fetch_tokens_per_s = values_per_s / values_per_token
    min_tokens, why = None, ""
    if link_bits_per_s is None:
        why = "the link was not measured; give --remote"
    elif prefill_tokens_per_s is None:
        why = "the prefill rate is not known; give --prefill-tokens-per-s"
    elif fetch_tokens_per_s <= prefill_tokens_per_s:
        why = "computing is as fast as fetching, at any length"
    else:
        gain_s = 1 / prefill_tokens_per_s - 1 / fetch_tokens_per_s
        min_tokens = int(2 * latency_s / gain_s) + 1
    return BreakEven(
        values_per_token,
        fetch_tokens_per_s if link_bits_per_s is not None else None,
        bound_by if link_bits_per_s is not None else None,
        RAW_BITS * device_values_per_s,
        min_tokens,
        why,
    )


def spec_of_model(path: pathlib.Path, page_tokens: int, tp_size: int) -> KVSpec:
    """The KV of one rank, as far as ``config.json`` tells: of a model with plain MHA, GQA or MQA in every layer.

    Args:
        path: a directory as Hugging Face has them, or its ``config.json``.
        page_tokens: of the server.
        tp_size: of the server; KV heads are repeated where there are fewer.

    Raises:
        ConfigurationError: no such file, or a model whose KV it does not tell.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file} is no model's configuration")
    text: Mapping[str, Any] = config.get("text_config") or config
    if text.get("kv_lora_rank"):
        raise ConfigurationError("the break-even is not known for MLA: its KV is one latent plane")
    kinds = set(text.get("layer_types") or ()) - {"full_attention"}
    if kinds or (text.get("sliding_window") and text.get("use_sliding_window", True)):
        raise ConfigurationError(
            f"the break-even is not known for layers of {', '.join(sorted(kinds)) or 'sliding windows'}"
        )
    try:
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        layers = int(text["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigurationError(f"{file} does not tell the shape of its KV: {error!r}") from error
    return KVSpec(layers, max(1, kv_heads // tp_size), head_dim, page_tokens, KVDtype.BFLOAT16)
