"""Builds models with SGLang, on no device, and prints what their rotations are: a process of its own, because SGLang
decides once per process which platform it runs on.

Arguments: directory of any model, path of a file to meet at. Reads ``[model type, module, class, fields of its
configuration]`` as JSON from standard input. Prints a line of JSON for each, behind a mark: the configuration as SGLang
sees it, and the rotation of its first layer with some rows of its table and what it makes of a K.
"""

import importlib
import json
import sys
import warnings

import torch
import transformers

warnings.simplefilter("ignore")

from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

MARK = "rotation: "
ROWS = (0, 1, 17, 100, 511, 2047)


def start(model: str, store: str) -> None:
    """Everything that a model asks of the process it is built in: one rank of one."""
    args = ServerArgs(model_path=model, device="cpu", attention_backend="torch_native")
    runtime_context.publish(args, role="test", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0))
    parallel_state.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{store}"
    )
    parallel_state.initialize_model_parallel()


def configuration(model_type: str, fields: dict) -> transformers.PretrainedConfig:
    if model_type in transformers.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(model_type, **fields)
    config = transformers.PretrainedConfig(**fields)  # as of a model with code of its own
    config.model_type = model_type
    return config


def first_rotation(model: torch.nn.Module) -> RotaryEmbedding:
    return next(module for module in model.modules() if isinstance(module, RotaryEmbedding))


def made_up_k(tokens: int, head_dim: int) -> torch.Tensor:
    """fp32 ``(tokens, 3, head_dim)``."""
    return (torch.arange(tokens * 3 * head_dim) * 29 % 97 / 48 - 1).reshape(tokens, 3, head_dim)


def look_at(model_type: str, module: str, name: str, fields: dict) -> dict:
    config = configuration(model_type, fields)
    seen = {**config.to_dict(), "model_type": model_type}
    model_class = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
    with torch.device("meta"):
        rotation = first_rotation(model_class(config))
    rotation.cos_sin_cache = rotation._compute_cos_sin_cache().float()
    positions = torch.tensor(ROWS)
    k = made_up_k(len(ROWS), rotation.head_size)
    return {
        "config": {key: value for key, value in seen.items() if key != "dtype"},
        "head_dim": rotation.head_size,
        "rotary_dim": rotation.rotary_dim,
        "is_neox_style": rotation.is_neox_style,
        "positions": ROWS,
        "table": rotation.cos_sin_cache[positions].tolist(),
        "k": rotation.forward_native(positions, k.clone(), k.clone())[1].tolist(),
    }


def main() -> None:
    start(*sys.argv[1:3])
    for case in json.load(sys.stdin):
        try:
            found = look_at(*case)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps(found, default=str), flush=True)


if __name__ == "__main__":
    main()
