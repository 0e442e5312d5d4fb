"""Which model lies in a directory: a digest of its files, quick to take and the same wherever they are copied."""

from __future__ import annotations

import hashlib
import pathlib

from sglang_kvcodec.errors import ConfigurationError

_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth"}
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


def model_files_digest(path: pathlib.Path) -> str:
    """Hex digest of ``config.json`` and of samples of every weight file: sizes, and 64 pieces of 64 KiB of each.

    Not a proof that two models are the same: all their bytes would have to be read. It tells apart any two that were
    trained or quantised differently.

    Args:
        path: a directory as Hugging Face has them, or a single weight file.

    Raises:
        ConfigurationError: there are no weights.
    """
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ConfigurationError(f"{path} holds no model: there is no file of weights")
    total = hashlib.sha256()
    config = path / "config.json"
    if config.is_file():
        total.update(hashlib.sha256(config.read_bytes()).digest())
    for file in files:
        size = file.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1) if size > _SAMPLE_BYTES else 0)
                total.update(stream.read(_SAMPLE_BYTES))
    return total.hexdigest()
