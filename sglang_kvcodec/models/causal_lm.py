"""A decoder whose KV cache can be taken out, put back, and differentiated with respect to.

Nothing here is about one architecture: keys and values are those of transformers' ``DynamicCache``, which every decoder
with plain attention fills after rotating the keys. Models for which that says too little are refused.

Layers with a sliding window get a cache of all tokens, too, as a server with kvcodec keeps it: transformers would keep
the window alone if the cache knew of it. What is outside the window is masked either way (``masking_utils.py``).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.models.loading import LoadedModel, load_model

KV = dict[Side, torch.Tensor]
"""``Side.KEY`` (after RoPE) and ``Side.VALUE``, each ``(layers, tokens, kv_heads, head_dim)``."""

_SIDES = (Side.KEY, Side.VALUE)
_POOL_DTYPES = (torch.bfloat16, torch.float16)
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache, as transformers plans them, whose layers can keep all keys and values instead."""


class CausalLM:
    """A model on this machine and its tokenizer. For one thread at a time."""

    def __init__(self, loaded: LoadedModel, dtype: torch.dtype) -> None:
        """Takes a model that was read; see :meth:`load`.

        Args:
            loaded: the model.
            dtype: element type of the KV that is handed out.

        Raises:
            UnsupportedError: not all of its layers keep the keys and values of every token in one shape.
        """
        self.tokenizer = loaded.tokenizer
        self.dtype = dtype
        self._model = loaded.model
        text_config = loaded.model.config.get_text_config(decoder=True)
        self.config: dict[str, Any] = text_config.to_dict()
        """Configuration of the text decoder, as in its ``config.json``."""
        self.layers = int(text_config.num_hidden_layers)
        self._layer_shape = _plain_layer_shape(loaded.model, text_config)

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> CausalLM:
        """Reads a model from local files.

        Args:
            path: a directory as Hugging Face has them (safetensors only), or a ``.gguf`` file.
            device: where it runs, as torch names it.
            dtype: element type of the KV that is handed out; the checkpoint's by default, bfloat16 if that has no
                16-bit type.
            compute_dtype: what the model computes in. By default float32 on a CPU, which few CPUs do slower than
                bfloat16 and which leaves the coding as the only rounding between two runs, and ``dtype`` elsewhere.

        Raises:
            ConfigurationError: nothing there, not a decoder that transformers knows, or no such device.
            UnsupportedError: a decoder whose cache is more than keys and values of one shape for each layer and token.
        """
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(f"can't use device {device!r}: {str(error).splitlines()[0]}") from error
        chosen = compute_dtype or (torch.float32 if torch.device(device).type == "cpu" else dtype or torch.bfloat16)
        loaded = load_model(pathlib.Path(path), device, chosen)
        if dtype is None:
            stated = loaded.checkpoint_dtype
            dtype = stated if stated in _POOL_DTYPES else torch.bfloat16
        if compute_dtype is None and torch.device(device).type != "cpu":
            loaded.model.to(dtype)
        return cls(loaded, dtype)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self._model.device
        return device

    def kv_spec(self, page_tokens: int) -> KVSpec:
        """The spec of pages of this model on a single rank.

        Raises:
            UnsupportedError: KV in a type that can't be coded.
        """
        kv_heads, head_dim = self._layer_shape
        dtype = KVDtype.from_torch_name(str(self.dtype).removeprefix("torch."))
        return KVSpec(self.layers, kv_heads, head_dim, page_tokens, dtype)

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text``, int64 ``(tokens,)`` on the model's device, without tokens that the text has not."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(torch.as_tensor(tokens).tolist()))

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, known: Mapping[Side, torch.Tensor] | None = None) -> KV:
        """Computes the KV of a prompt as a server's pool would hold it.

        Args:
            tokens: int64 ``(tokens,)``, the whole prompt.
            known: KV of its first tokens, of all but one at most, from which the rest is computed.

        Returns:
            Of the tokens behind ``known``, per side ``(layers, tokens, kv_heads, head_dim)`` in ``dtype``, tensors of
            their own; keys after RoPE.

        Raises:
            ValueError: KV of another shape, or of too many tokens.
        """
        start = known[Side.KEY].shape[1] if known else 0
        if start >= len(tokens):
            raise ValueError(f"KV of {start} tokens leaves nothing of a prompt of {len(tokens)} to compute")
        cache = self._cache_of(self._checked(known, start)) if known else DynamicCache()
        # the decoder without its head: nobody asked for logits
        self._model.base_model(input_ids=tokens[None, start:].to(self.device), past_key_values=cache, use_cache=True)
        return {
            Side.KEY: _stack([layer.keys[:, :, start:] for layer in cache.layers], self.dtype),
            Side.VALUE: _stack([layer.values[:, :, start:] for layer in cache.layers], self.dtype),
        }

    @torch.no_grad()
    def continue_from(
        self, kv: Mapping[Side, torch.Tensor], prefix: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Logits of what follows a prefix whose KV is given.

        Args:
            kv: of the prefix; left as it is.
            prefix: int64 ``(n,)``, the tokens whose KV this is.
            tokens: int64 ``(m,)``, which follow, at least one.

        Returns:
            float32 ``(m, vocabulary)``: row i is the distribution of what follows ``tokens[: i + 1]``.

        Raises:
            ValueError: KV of another shape or number of tokens.
        """
        logits: torch.Tensor = self._run(self._cache_of(self._checked(kv, len(prefix))), tokens).float()
        return logits

    @torch.no_grad()
    def generate_greedy(self, kv: Mapping[Side, torch.Tensor], prefix: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count`` likeliest tokens, one after another, without a stop at an end-of-text token.

        Args:
            kv: of the first tokens of the prompt, of all but one at most, as in a server, which computes the last
                token of a prompt whatever is cached. Left as it is.
            prefix: int64 ``(n,)``, the whole prompt.
            count: how many tokens to make.

        Returns:
            int64 ``(count,)``.

        Raises:
            ValueError: KV of another shape, or of too many tokens.
        """
        known = kv[Side.KEY].shape[1]
        if known >= len(prefix):
            raise ValueError(f"KV of {known} tokens leaves nothing of a prompt of {len(prefix)} to compute")
        cache = self._cache_of(self._checked(kv, known))
        made: list[torch.Tensor] = []
        tokens = prefix[known:]
        while len(made) < count:
            tokens = self._run(cache, tokens)[-1:].argmax(-1)
            made.append(tokens)
        return torch.cat(made) if made else prefix[:0].to(self.device)

    def kv_gradients(
        self,
        prefix_kv: Mapping[Side, torch.Tensor],
        continuation: torch.Tensor,
        samples: int,
        generator: torch.Generator,
    ) -> Iterator[KV]:
        """Draws Fisher score vectors of the prefix's KV.

        For each sample every position of the continuation draws a label from the model's own next-token distribution,
        and the gradient of the summed log-likelihood of these labels with respect to the prefix's keys (after RoPE) and
        values is given. The mean of their outer products is an unbiased estimate of the Fisher information, the
        curvature of the KL divergence between the model's outputs with untouched and with disturbed KV (Martens, "New
        insights and perspectives on the natural gradient method", sections 5 and 9). Labels from the text instead
        would give the "empirical Fisher", which is not that curvature.

        Args:
            prefix_kv: as :meth:`prefill` gives it; left as it is.
            continuation: int64 ``(m,)``, which follow the prefix.
            samples: how many score vectors; one forward pass serves all.
            generator: draws the labels; on the model's device.

        Yields:
            Per side float32 ``(layers, tokens, kv_heads, head_dim)``.

        Raises:
            ValueError: KV of another shape.
        """
        checked = self._checked(prefix_kv, prefix_kv[Side.KEY].shape[1])
        leaves = {side: tensor.detach().float().requires_grad_() for side, tensor in checked.items()}
        with torch.enable_grad():
            logits = self._run(self._cache_of(leaves), continuation)
            probabilities = logits.detach().float().softmax(-1)
        for sample in range(samples):
            labels = torch.multinomial(probabilities, 1, generator=generator)
            # the gradient of log softmax at the label: one-hot minus the probabilities
            score = -probabilities
            score.scatter_add_(1, labels, torch.ones_like(labels, dtype=score.dtype))
            key, value = torch.autograd.grad(
                logits, list(leaves.values()), score.to(logits.dtype), retain_graph=sample + 1 < samples
            )
            yield {Side.KEY: key, Side.VALUE: value}

    def _checked(self, kv: Mapping[Side, torch.Tensor], tokens: int) -> KV:
        expected = (self.layers, tokens, *self._layer_shape)
        for side in _SIDES:
            if tuple(kv[side].shape) != expected:
                raise ValueError(f"{side.value}s of {tuple(kv[side].shape)}, not of {expected}")
        return {side: kv[side].to(self.device) for side in _SIDES}

    def _cache_of(self, kv: KV) -> DynamicCache:
        dtype = self._model.dtype
        sides = [kv[side].to(dtype).transpose(1, 2).unsqueeze(1).unbind(0) for side in _SIDES]
        return DynamicCache(list(zip(*sides, strict=True)))

    def _run(self, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(tokens, vocabulary)`` in the compute dtype; the cache grows by the tokens."""
        logits: torch.Tensor = self._model(
            input_ids=tokens[None].to(self.device), past_key_values=cache, use_cache=True
        ).logits
        return logits[0]


def use_threads(count: int) -> None:
    """Lets torch use ``count`` threads of the CPU, in the whole process."""
    torch.set_num_threads(count)


def _stack(layers: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Tensors ``(1, kv_heads, tokens, head_dim)`` to ``(layers, tokens, kv_heads, head_dim)``, contiguous."""
    return torch.stack([layer[0].transpose(0, 1).to(dtype) for layer in layers])


@torch.no_grad()
def _plain_layer_shape(model: Any, text_config: Any) -> tuple[int, int]:
    """KV heads and head dim of a model all of whose layers attend to keys and values; found by running one token.

    Raises:
        UnsupportedError: another kind of model.
    """
    name = text_config.model_type
    if getattr(text_config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{name} models cache a latent (MLA) in a server and keys and values here, so nothing can be learnt of the "
            "latent here; a server makes a calibration for it itself, with --kvcodec-auto-calibrate true"
        )
    planned = DynamicCache(config=text_config).layers
    if any(type(layer) not in _PLAIN_LAYERS for layer in planned):
        raise UnsupportedError(
            f"this {name} model has layers with linear attention or another state than keys and values, which are not "
            "supported"
        )
    cache = DynamicCache()
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model.base_model(input_ids=token, past_key_values=cache, use_cache=True)
    shapes = {
        tuple(side.shape) for layer in cache.layers if layer.is_initialized for side in (layer.keys, layer.values)
    }
    if len(cache.layers) != text_config.num_hidden_layers or len(shapes) != 1:
        raise UnsupportedError(
            f"this {name} model does not keep keys and values of one shape in each of its "
            f"{text_config.num_hidden_layers} layers, which is not supported"
        )
    _, kv_heads, _, head_dim = shapes.pop()
    return kv_heads, head_dim
