"""Where new pages are packed: by kernels on the pool's GPU, or by the reference."""

from __future__ import annotations

import logging

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.restore_kernel import calibrated
from sglang_kvcodec.format.profile import EXACT
from sglang_kvcodec.kernels import PagePacks, PageRestores, check_pack
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)


def pack_kernels(
    pool: PagedKVPool, transforms: PageTransforms, restores: PageRestores | None, calibration_digest: bytes = b""
) -> PagePacks | None:
    """The kernels for a pool on a CUDA device, compiled and checked there; None elsewhere or where nothing is computed.

    Args:
        pool: where pages come from.
        transforms: of the pages.
        restores: the kernels that restore them, whose tables are shared.
        calibration_digest: of the calibration that is in use at start; empty for none.

    Raises:
        ConfigurationError: kernels are needed, and there is no Triton or one does not pack what the reference does.
    """
    if pool.device.type != "cuda":
        logger.info("kvcodec: pages are packed by the transforms, the pool is on %s", pool.device)
        return None
    if not transforms.have_pictures:
        logger.info("kvcodec: profile %r is copied from %s as it is", ",".join(transforms.tiers), pool.device)
        return None
    packs = PagePacks(transforms, pool.device)
    for coding in transforms.codings():
        if coding.profile.has_pictures:
            check_pack(packs.get(*coding), transforms.get(*coding), pool.spec, pool.device)
    if calibration_digest:
        check_calibrated_pack(packs, transforms, restores, calibration_digest, pool)
    logger.info("kvcodec: pages are packed by Triton kernels on %s", pool.device)
    return packs


def check_calibrated_pack(
    packs: PagePacks,
    transforms: PageTransforms,
    restores: PageRestores | None,
    calibration_digest: bytes,
    pool: PagedKVPool,
) -> None:
    """Opens and checks what packs with a calibration: at start, or when one comes late, before pages are coded with it.

    So is what packs exact pages: those that it can't code become some.

    Raises:
        ConfigurationError: it does not pack what the reference does.
        ForeignPageError: the calibration is not known.
    """
    calibration = transforms.calibration(calibration_digest)
    check_pack(packs.get(EXACT.name), transforms.get(EXACT.name), pool.spec, pool.device)
    for coding in calibrated(transforms.codings(calibration_digest)):
        like = restores.get(*coding) if restores is not None else None
        pack = packs.get(*coding, like)
        check_pack(pack, transforms.get(*coding), pool.spec, pool.device, calibration, coding.profile_name)
