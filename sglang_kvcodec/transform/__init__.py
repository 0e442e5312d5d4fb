"""KV values to 8-bit canvases and side bytes, and back: the reference of the format, in torch, on any device."""

from sglang_kvcodec.transform.base import PackedSide, Transform
from sglang_kvcodec.transform.pages import PageTransform, PageTransforms
from sglang_kvcodec.transform.registry import get_transform

__all__ = ["PackedSide", "PageTransform", "PageTransforms", "Transform", "get_transform"]
