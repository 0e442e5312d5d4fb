"""Where the files of the model that SGLang has loaded are: what a calibration is found by."""

from __future__ import annotations

import pathlib
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import ShardLayout, model_digest
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.format.spec import KVSpec


def local_model_path(server_args: Any) -> pathlib.Path:
    """The directory or ``.gguf`` file of ``server_args.model_path``; for a hub id, the snapshot that SGLang has loaded.

    Nothing is downloaded.

    Raises:
        ConfigurationError: it is neither here nor among the local snapshots.
    """
    path = pathlib.Path(server_args.model_path)
    if path.exists():
        return path
    try:
        found = snapshot_download(
            server_args.model_path,
            revision=getattr(server_args, "revision", None),
            cache_dir=getattr(server_args, "download_dir", None),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ConfigurationError(f"the files of model {server_args.model_path!r} are not on this machine") from error
    return pathlib.Path(found)


def calibrated_model_digest(ctx: Any, spec: KVSpec, first_layer: int) -> bytes:
    """Names the model and shard of this rank, as ``kvcodec calibrate`` names it.

    Args:
        ctx: SGLang's ``TreeCacheBuildContext``.
        spec: of the rank's pages.
        first_layer: of its layers.

    Raises:
        ConfigurationError: the model's files can't be found.
        OSError: they can't be read.
    """
    layout = ShardLayout(
        spec.layers, spec.kv_heads, spec.head_dim, first_layer, ctx.tp_rank, ctx.tp_size, sides=spec.sides
    )
    return model_digest(model_files_digest(local_model_path(ctx.server_args)), layout)
