"""Triton kernels, each beside its torch reference. Triton is imported when the first one is asked for."""

from sglang_kvcodec.kernels.base import KernelRestore, PagePack, PageRestore
from sglang_kvcodec.kernels.check import check_calibrated, check_digest, check_restore
from sglang_kvcodec.kernels.check_pack import check_pack
from sglang_kvcodec.kernels.page_packs import PagePacks, ReferencePack
from sglang_kvcodec.kernels.pages import PageRestores
from sglang_kvcodec.kernels.registry import open_calibrated_restore, open_restore, picture_digests

__all__ = [
    "KernelRestore",
    "PagePack",
    "PagePacks",
    "PageRestore",
    "PageRestores",
    "ReferencePack",
    "check_calibrated",
    "check_digest",
    "check_pack",
    "check_restore",
    "open_calibrated_restore",
    "open_restore",
    "picture_digests",
]
