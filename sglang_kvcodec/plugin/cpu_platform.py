"""Lets stock SGLang run on a machine without a GPU: for tests, demos and a look around, not for speed.

Active only when asked for by name: ``SGLANG_PLATFORM=kvcodec_cpu``.
"""

from __future__ import annotations

import os
import sys

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformCapabilities, PlatformEnum, SRTPlatform

NAME = "kvcodec_cpu"


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU without AMX, computing with plain PyTorch."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """The only backend that needs no native kernels."""
        return "torch_native"

    def init_backend(self) -> None:
        """Has models with latent attention attend in the latent space.

        What SGLang does for a backend that these models don't know (``attention_backend_handler.py``) prefills with
        keys and values beside the pool, and ``torch_native`` looks at nothing but the pool.
        """
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)

    def is_pin_memory_available(self, device: object = None) -> bool:
        """There is no device to pin for."""
        return False


def resolve() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the class to use, or None when another platform is wanted.

    SGLang asks every platform while sglang is imported. It is all of this package that ``sglang serve --help`` runs by
    itself, and so where the flags get into that help.
    """
    if sys.argv[1:2] == ["serve"] and not {"-h", "--help"}.isdisjoint(sys.argv):
        from sglang_kvcodec.plugin.hooks import load_plugins_for_serve_help

        load_plugins_for_serve_help()
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    return f"{PlainCpuPlatform.__module__}.{PlainCpuPlatform.__qualname__}"
