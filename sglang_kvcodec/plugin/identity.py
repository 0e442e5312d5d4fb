"""What a server's KV depends on besides tokens: the namespace of its pages."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import torch

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.format.namespace import Namespace
from sglang_kvcodec.format.profile import Profile
from sglang_kvcodec.format.spec import KVSpec

_CHUNK_WORDS = 1 << 20
"""Words hashed at a time: bounds the scratch memory on a GPU whose pool has already taken the rest."""
_MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)
_VOLATILE_CONFIG = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"}


def weights_digest(model: torch.nn.Module) -> str:
    """Digest of every parameter and persistent buffer as they are on the device: names, shapes, dtypes, all bytes.

    Taken from the loaded model, not from files: it covers quantisation, sharding, merged adapters, dummy weights and
    updates in place, and reads at the speed of the device's memory.
    """
    total = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):
            continue
        sums = _tensor_sums(tensor)
        total.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{sums[0]:x}|{sums[1]:x}\n".encode())
    return total.hexdigest()


def _tensor_sums(tensor: torch.Tensor) -> tuple[int, int]:
    """Two position-dependent 64-bit sums over the tensor's bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 4:
        # A view into the middle of another tensor.
        data = data.clone()
    padding = -data.numel() % 4
    if padding:
        data = torch.nn.functional.pad(data, (0, padding))
    words = data.view(torch.int32)
    sums = [torch.zeros((), dtype=torch.int64, device=words.device) for _ in _MULTIPLIERS]
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64) + (1 << 33)
        position = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=words.device)
        for i, multiplier in enumerate(_MULTIPLIERS):
            weight = position * multiplier
            weight = (weight ^ (weight >> 29)) * multiplier
            sums[i] += (chunk * (weight | 1)).sum()
    return int(sums[0]) & (2**64 - 1), int(sums[1]) & (2**64 - 1)


def config_digest(hf_config: Any) -> str:
    """Digest of the model's configuration without what does not touch its output."""
    fields = {name: value for name, value in hf_config.to_dict().items() if name not in _VOLATILE_CONFIG}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def rope_json(hf_config: Any) -> str:
    """The RoPE parameters as canonical JSON."""
    fields = {name: value for name, value in hf_config.to_dict().items() if "rope" in name or "rotary" in name}
    return json.dumps(fields, sort_keys=True, default=str, separators=(",", ":")) if fields else ""


def adapters_digest(lora_paths: Any) -> str:
    """Digest of the LoRA adapters given at start; empty without any.

    SGLang puts an adapter's id into the page hash. The id of an adapter given at start is made of its name and path
    alone, so what lies there has to be looked at; one loaded later gets a random id and is never shared.

    Raises:
        UnsupportedError: an adapter that is not a local directory.
    """
    total = hashlib.sha256()
    for adapter in sorted(lora_paths or [], key=lambda ref: str(ref.lora_id)):
        directory = pathlib.Path(adapter.lora_path)
        if not directory.is_dir():
            raise UnsupportedError(f"kvcodec needs LoRA adapters as local directories, not {adapter.lora_path!r}")
        total.update(str(adapter.lora_id).encode())
        for path in sorted(directory.iterdir()):
            if path.is_file():
                with path.open("rb") as file:
                    total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest() if lora_paths else ""


def build_namespace(ctx: Any, spec: KVSpec, profile: Profile) -> Namespace:
    """The namespace of uncalibrated pages of the server that ``ctx`` (SGLang's ``TreeCacheBuildContext``) is built for.

    Raises:
        UnsupportedError: see :func:`adapters_digest`.
    """
    hf_config = ctx.model_config.hf_config
    return Namespace(
        weights_digest=weights_digest(ctx.tp_worker.model_runner.model),
        config_digest=config_digest(hf_config),
        rope=rope_json(getattr(ctx.model_config, "hf_text_config", hf_config)),
        spec=spec,
        first_layer=ctx.params.token_to_kv_pool_allocator.get_kvcache().start_layer or 0,
        tp_rank=ctx.tp_rank,
        tp_size=ctx.tp_size,
        pp_rank=ctx.params.pp_rank,
        pp_size=ctx.params.pp_size,
        page_hash_scheme="sglang-0.5.23/bigram" if ctx.params.is_eagle else "sglang-0.5.23",
        adapters_digest=adapters_digest(ctx.server_args.lora_paths),
        profile=profile.name,
        stages=profile.stages,
    )
