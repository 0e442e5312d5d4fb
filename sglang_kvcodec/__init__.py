"""A remote KV cache for SGLang that carries KV as lossless HEVC video."""

__version__ = "0.1.0"
