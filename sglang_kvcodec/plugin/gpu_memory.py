"""GPU memory that SGLang must leave to kvcodec: decoders allocate outside of torch, and both come after the KV pool.

SGLang sizes its pool when the model is loaded: free memory, less ``1 - mem_fraction_static`` of what was free before
the model (``KVCacheConfigurator._profile_available_bytes``, and after graphs are captured
``compute_post_capture_kv_resize``). A lower fraction is less for either.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.plugin.settings import BACKEND_NAME, server_config

logger = logging.getLogger(__name__)

_SHARE_FREE = 0.95
"""Of a device, before the model is loaded: what SGLang takes the fraction of. CUDA itself takes some hundred MB."""


def keep_room(server_args: Any) -> None:
    """Lowers SGLang's share of the GPU by what kvcodec may take; for a server without kvcodec or a GPU, nothing.

    Args:
        server_args: while SGLang resolves them, after it has settled ``mem_fraction_static``.

    Raises:
        ConfigurationError: nothing would be left.
    """
    if getattr(server_args, "radix_cache_backend", None) != BACKEND_NAME:
        return
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.utils.common import get_device_memory_capacity

    resolved = resolving_view(server_args)
    config = server_config(server_args)
    if resolved.device != "cuda" or resolved.mem_fraction_static is None or config.tiers == ("raw",):
        return
    device_mib = get_device_memory_capacity(resolved.device)
    if device_mib is None:
        logger.warning("kvcodec: the GPU's memory is not known, leave %d MiB to kvcodec", config.gpu_memory_bytes >> 20)
        return
    before = resolved.mem_fraction_static
    lowered = lowered_fraction(before, int(device_mib * (1 << 20)), config.gpu_memory_bytes)
    declare_resolution(server_args, "kvcodec", mem_fraction_static=lowered)
    logger.info(
        "kvcodec: --mem-fraction-static %.4f lowered to %.4f, which leaves %d MiB to decoders and restore buffers",
        before,
        lowered,
        config.gpu_memory_bytes >> 20,
    )


def lowered_fraction(fraction: float, device_bytes: int, reserved_bytes: int) -> float:
    """SGLang's share of a device that leaves ``reserved_bytes`` more than ``fraction`` does.

    Raises:
        ConfigurationError: nothing would be left.
    """
    lowered = fraction - reserved_bytes / (_SHARE_FREE * device_bytes)
    if lowered <= 0:
        raise ConfigurationError(
            f"{reserved_bytes >> 20} MiB for decoders and restore buffers leave nothing of a GPU with "
            f"{device_bytes >> 20} MiB; lower --kvcodec-gpu-memory"
        )
    return lowered
