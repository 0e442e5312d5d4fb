"""Triton kernels, each beside its torch reference. Triton is imported when the first one is asked for."""

from sglang_kvcodec.kernels.base import KernelRestore, PageRestore
from sglang_kvcodec.kernels.check import check_calibrated, check_digest, check_restore
from sglang_kvcodec.kernels.pages import PageRestores
from sglang_kvcodec.kernels.registry import open_calibrated_restore, open_restore

__all__ = [
    "KernelRestore",
    "PageRestore",
    "PageRestores",
    "check_calibrated",
    "check_digest",
    "check_restore",
    "open_calibrated_restore",
    "open_restore",
]
