"""What a serving GPU is busy with: products of matrices, and the decode steps of a Llama-like model, in plain torch."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch.nn import functional

from benchmarks.gpu.rig import Rig


class ProductLoop:
    """Large products, bound by the tensor cores."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        side = rig.pick(4096, 96)
        self._matrix = torch.randn(side, side, device=rig.device, dtype=torch.bfloat16)

    def rate(self, seconds: float) -> float:
        """Products per second."""
        return _rate(self._rig, lambda: self._matrix @ self._matrix, seconds, self._rig.pick(16, 2))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model and its batch; the default is a quarter of the layers of an 8B model, 32 requests of 2 048 tokens."""

    layers: int = 8
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    batch: int = 32
    tokens: int = 2048


SMALL = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, batch=2, tokens=24)


class DecodeLoop:
    """Steps of one token for each request: projections, attention over all tokens before, MLP; one CUDA graph."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.shape = shape = rig.pick(Shape(), SMALL)
        generator = torch.Generator(device=rig.device).manual_seed(0)

        def weight(*size: int) -> torch.Tensor:
            values = torch.randn(size, device=rig.device, dtype=torch.bfloat16, generator=generator)
            return values / size[0] ** 0.5

        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._layers = [
            {
                "qkv": weight(shape.hidden, query + 2 * kv),
                "out": weight(query, shape.hidden),
                "up": weight(shape.hidden, 2 * shape.intermediate),
                "down": weight(shape.intermediate, shape.hidden),
                "cache": weight(2, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim),
            }
            for _ in range(shape.layers)
        ]
        self._input = weight(shape.batch, shape.hidden)
        self._graph: torch.cuda.CUDAGraph | None = None
        if not rig.is_rehearsal:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.step()

    def step(self) -> torch.Tensor:
        """One token of each request: ``(batch, hidden)``."""
        shape = self.shape
        hidden = self._input
        for layer in self._layers:
            normed = functional.rms_norm(hidden, (shape.hidden,))
            query, key, value = (normed @ layer["qkv"]).split(
                [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2], dim=-1
            )
            # The new token takes the place of the last one, so that the work stays the same.
            keys, values = layer["cache"]
            keys[:, :, -1], values[:, :, -1] = (
                each.view(shape.batch, shape.kv_heads, shape.head_dim) for each in (key, value)
            )
            grouped = query.view(shape.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
            attended = functional.scaled_dot_product_attention(grouped, keys, values)
            hidden = hidden + attended.reshape(shape.batch, -1) @ layer["out"]
            gate, up = (functional.rms_norm(hidden, (shape.hidden,)) @ layer["up"]).chunk(2, dim=-1)
            hidden = hidden + (functional.silu(gate) * up) @ layer["down"]
        return hidden

    def rate(self, seconds: float) -> float:
        """Steps per second."""
        graph = self._graph
        return _rate(self._rig, graph.replay if graph is not None else self.step, seconds, self._rig.pick(8, 1))


def _rate(rig: Rig, work: object, seconds: float, at_once: int) -> float:
    """How often ``work`` is done per second, waiting for its own stream alone after each ``at_once``."""
    assert callable(work)
    done, start_s = 0, time.perf_counter()
    while not done or time.perf_counter() - start_s < seconds:
        for _ in range(at_once):
            work()
        rig.synchronize_current()
        done += at_once
    return done / (time.perf_counter() - start_s)
