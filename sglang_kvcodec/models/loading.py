"""Reads a decoder and its tokenizer from local files: a Hugging Face directory, or a GGUF file. Never remote code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sglang_kvcodec.errors import ConfigurationError

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What was read.

    Attributes:
        model: a ``transformers`` decoder with a language-model head, in eval mode, parameters without gradients.
        tokenizer: its ``transformers`` tokenizer.
        checkpoint_dtype: the type of the weights as the checkpoint states it; None if it does not.
    """

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype | None


def load_model(path: pathlib.Path, device: str, compute_dtype: torch.dtype) -> LoadedModel:
    """Reads ``path``.

    Args:
        path: a directory with ``config.json`` and safetensors, or a ``.gguf`` file.
        device: where to, as torch names it.
        compute_dtype: what the weights are turned into.

    Raises:
        ConfigurationError: nothing there, or not a decoder that transformers knows.
    """
    if not path.exists():
        raise ConfigurationError(f"there is no model at {path}; give a directory or a .gguf file on this machine")
    with _quiet(), _explained(path):
        loaded = _load_directory(path, compute_dtype) if path.is_dir() else _load_gguf(path, compute_dtype)
        model = loaded.model.to(device).eval().requires_grad_(False)
    return dataclasses.replace(loaded, model=model)


def _load_directory(path: pathlib.Path, dtype: torch.dtype) -> LoadedModel:
    config = transformers.AutoConfig.from_pretrained(path, **_LOCAL)
    stated = config.get_text_config(decoder=True).dtype
    # safetensors only: the older format is pickled
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **_LOCAL)
    return LoadedModel(model, transformers.AutoTokenizer.from_pretrained(path, **_LOCAL), stated)


def _load_gguf(path: pathlib.Path, dtype: torch.dtype) -> LoadedModel:
    """Reads and dequantises a GGUF file.

    ``from_pretrained(gguf_file=...)`` insists on the package accelerate, which it does not use for this, and which
    changes how SGLang loads models where it is installed. So the tensors are read with the function below it
    (``modeling_gguf_pytorch_utils.py``) and given to ``from_pretrained``, which still ties and checks them.
    """
    place = {"gguf_file": path.name, **_LOCAL}
    config = transformers.AutoConfig.from_pretrained(path.parent, **place)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=dtype)
    model, report = type(skeleton).from_pretrained(
        None, config=config, state_dict=read["tensors"], dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ConfigurationError(f"{path} lacks {len(report['missing_keys'])} tensors of a {config.model_type} model")
    return LoadedModel(model, transformers.AutoTokenizer.from_pretrained(path.parent, **place), None)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Turns what transformers raises over a model it can't read into one sentence."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"can't load a decoder from {path}: {words}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and advice of transformers, which would break up a command's own output."""
    log = transformers.utils.logging
    had_bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has a bar that nothing turns off
            yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
