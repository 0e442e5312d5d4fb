"""Gets a model's calibration from the peer while a server starts, and says what came of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import ConfigurationError, KVCodecError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

USED = "used"
NOT_STORED = "not_stored"
OTHER_RANK = "other_rank"


@dataclasses.dataclass(frozen=True)
class CalibrationSearch:
    """What asking for a calibration has brought.

    Attributes:
        calibration: read and checked, of the right model and shape; None if there is none to use.
        outcome: a word for the metric: :data:`USED`, :data:`NOT_STORED`, or the reason of an error.
        why: the same in words, of a search that has brought nothing.
    """

    calibration: Calibration | None
    outcome: str
    why: str = ""


def search_calibration(
    peer: PeerTransport, model_digest: Callable[[], bytes], transforms: PageTransforms
) -> CalibrationSearch:
    """Asks the peer for the current calibration of a model and adds it to the transforms. Never raises.

    Args:
        peer: whom to ask; its time-outs bound how long this takes.
        model_digest: names the model and shard; may raise ``KVCodecError`` or ``OSError`` where that can't be known.
        transforms: learn the calibration; as they were if it can't be used.
    """
    try:
        digest = model_digest()
        artifact = peer.get_calibration(digest)
        if artifact is None:
            return CalibrationSearch(None, NOT_STORED, f"the peer has none for model {digest.hex()}")
        calibration = Calibration.from_bytes(artifact, expected_model=digest)
        transforms.add(calibration)
    except ConfigurationError as error:
        return CalibrationSearch(None, "unknown_model", str(error))
    except KVCodecError as error:
        return CalibrationSearch(None, error.reason, str(error))
    except OSError as error:
        return CalibrationSearch(None, "unreadable_model", f"the model's files can't be read: {error}")
    except torch.OutOfMemoryError as error:
        return CalibrationSearch(None, "out_of_memory", str(error).partition("\n")[0])
    return CalibrationSearch(calibration, USED)


def settle_calibration(
    found: CalibrationSearch, transforms: PageTransforms, all_ranks: Callable[[bool], bool]
) -> Calibration | None:
    """Which calibration this rank uses from now on: its own if every rank has one, or else none. Logs and counts it.

    Ranks that were of two minds would publish pages that no other server has all parts of.

    Args:
        found: by this rank.
        transforms: that it was added to.
        all_ranks: tells the other ranks whether this one has found its own; whether all have.
    """
    agreed = all_ranks(found.calibration is not None)
    if found.calibration is not None and not agreed:
        found = CalibrationSearch(None, OTHER_RANK, "another rank has none")
    metrics.CALIBRATIONS.labels(outcome=found.outcome).inc()
    calibration = found.calibration
    if calibration is None:
        logger.warning(
            "kvcodec: profile %r runs uncalibrated, as %r, because there is no calibration to use (%s): %s",
            ",".join(transforms.tiers),
            ",".join(coding.profile_name for coding in transforms.codings()),
            found.outcome,
            found.why,
        )
        return None
    logger.info(
        "kvcodec: profile %r is calibrated: artifact %s, %d bytes, blocks of %d layers, %s",
        ",".join(transforms.tiers),
        calibration.digest.hex()[:16],
        len(calibration.encoded),
        calibration.layers_per_block,
        "K without its rotation" if calibration.rope is not None else "K as it is",
    )
    return calibration
