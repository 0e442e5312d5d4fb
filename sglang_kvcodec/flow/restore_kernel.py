"""Where the values of pages are restored: by a kernel on the pool's GPU, or by the reference on the host."""

from __future__ import annotations

import logging

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.kernels import KernelRestore, check_restore, open_restore

logger = logging.getLogger(__name__)


def restore_kernel(pool: PagedKVPool, profile_name: str) -> KernelRestore | None:
    """The kernel for a pool on a CUDA device, compiled and checked there; None elsewhere, or where nothing is computed.

    Raises:
        ConfigurationError: a kernel is needed, and there is no Triton or it does not restore what the reference does.
    """
    if pool.device.type != "cuda":
        logger.info("kvcodec: pages are restored on the host, the pool is on %s", pool.device)
        return None
    kernel = open_restore(profile_name, pool.spec)
    if kernel is None:
        logger.info("kvcodec: profile %r is copied to %s as it is", profile_name, pool.device)
        return None
    check_restore(kernel, profile_name, pool.spec, pool.device)
    logger.info("kvcodec: pages are restored by a Triton kernel on %s", pool.device)
    return kernel
