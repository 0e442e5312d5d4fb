"""Where the files of the model that SGLang has loaded are: what a calibration is found by."""

from __future__ import annotations

import pathlib
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from sglang_kvcodec.errors import ConfigurationError


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
