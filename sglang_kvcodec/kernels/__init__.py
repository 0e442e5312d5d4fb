"""Triton kernels, each beside its torch reference. Triton is imported when the first one is asked for."""

from sglang_kvcodec.kernels.base import KernelRestore
from sglang_kvcodec.kernels.check import check_restore
from sglang_kvcodec.kernels.registry import open_restore

__all__ = ["KernelRestore", "check_restore", "open_restore"]
