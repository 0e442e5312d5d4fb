"""Where the values of pages are restored: by kernels on the pool's GPU, or by the reference on the host."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.format.profile import EXACT, Coding
from sglang_kvcodec.kernels import PageRestores, check_calibrated, check_digest, check_restore, open_restore
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.transform.klt import KltTransform

logger = logging.getLogger(__name__)


def restore_kernels(
    pool: PagedKVPool, transforms: PageTransforms, calibration_digest: bytes = b""
) -> PageRestores | None:
    """The kernels for a pool on a CUDA device, compiled and checked there; None elsewhere or where nothing is computed.

    Args:
        pool: where pages go.
        transforms: of the pages.
        calibration_digest: of the calibration that is in use at start; empty for none.

    Raises:
        ConfigurationError: kernels are needed, and there is no Triton or one does not restore what the reference does.
    """
    if pool.device.type != "cuda":
        logger.info("kvcodec: pages are restored on the host, the pool is on %s", pool.device)
        return None
    if not transforms.have_pictures:
        logger.info("kvcodec: profile %r is copied to %s as it is", ",".join(transforms.tiers), pool.device)
        return None
    kernels = PageRestores(transforms, pool.device)
    plain = {coding.profile_name for coding in transforms.codings() if coding.profile.has_pictures}
    # Pages of a calibrated tier come with exact ones among them, and with those of the time before it was calibrated.
    for profile_name in plain | {EXACT.name} if calibration_digest else plain:
        kernel = open_restore(profile_name, pool.spec)
        assert kernel is not None, "a profile with pictures has a kernel"
        check_restore(kernel, profile_name, pool.spec, pool.device)
    for shape in {transforms.get(profile_name).canvas_shape for profile_name in plain}:
        check_digest(shape, pool.device)
    if calibration_digest:
        check_calibrated_kernel(kernels, transforms, calibration_digest, pool)
    logger.info("kvcodec: pages are restored by a Triton kernel on %s", pool.device)
    return kernels


def check_calibrated_kernel(
    kernels: PageRestores, transforms: PageTransforms, calibration_digest: bytes, pool: PagedKVPool
) -> None:
    """Opens and checks the kernels of a calibration: at start, or when one comes late, before its pages are fetched.

    Raises:
        ConfigurationError: it does not restore what the reference does.
        ForeignPageError: the calibration is not known.
    """
    calibration = transforms.calibration(calibration_digest)
    for coding in calibrated(transforms.codings(calibration_digest)):
        reference = transforms.get(*coding)
        assert isinstance(reference, KltTransform), "a calibrated tier has this transform"
        kernel = kernels.get(*coding)
        check_digest(reference.canvas_shape, pool.device)
        check_calibrated(kernel, reference, calibration, coding.profile_name, pool.device)


def calibrated(codings: Sequence[Coding]) -> list[Coding]:
    """Those that need a calibration."""
    return [coding for coding in codings if coding.calibration_digest]
