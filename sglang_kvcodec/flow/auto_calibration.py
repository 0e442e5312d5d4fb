"""Makes a calibration from the pages that a server publishes, in the background, where its peer has none."""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.calibration.by_noise import Run, calibrate_by_noise, tokens_needed
from sglang_kvcodec.calibration.statistics import KVStatistics
from sglang_kvcodec.errors import CalibrationError, KVCodecError, PeerError, PeerRejectedError
from sglang_kvcodec.flow.calibrations import NOT_STORED, USED, search_calibration
from sglang_kvcodec.flow.niceness import be_nice
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.transform import PageTransforms

logger = logging.getLogger(__name__)

LAYERS_PER_BLOCK = 3
"""What codes smallest, and fits the pictures of every model."""
TOKENS_MARGIN = 1.5
"""How many more tokens are gathered than bases need at least."""
SAMPLE_PAGES = 12
"""Of the last pages: which components are worth coding is seen on them."""
QUEUE_PAGES = 8
"""Pages that wait to be added; what does not fit is left out, there are always more."""
NICENESS = 19
"""The lowest priority there is."""
MADE = "made"
_UNANSWERED = {"peer_unavailable", "peer_timeout"}
_REPLACEABLE = {NOT_STORED, "format", "truncated", "checksum"}
"""What may be put over: nothing, or bytes that are no calibration. What merely does not fit here is somebody else's."""


class AutoCalibration:
    """Gathers, computes, stores, on one thread of the lowest priority, until there is a calibration or can be none."""

    def __init__(
        self,
        peer: PeerTransport,
        retry_s: float,
        statistics: KVStatistics,
        model_digest: bytes,
        transforms: PageTransforms,
        on_calibration: Callable[[Calibration], None],
    ) -> None:
        """Starts the thread.

        Args:
            peer: where calibrations are kept.
            retry_s: pause before it is asked again where it did not answer.
            statistics: of this rank's layout, with nothing gathered yet; the thread's from now on.
            model_digest: names the model and shard.
            transforms: learn the calibration.
            on_calibration: called once at most, on the thread, with one that the transforms and the peer have: this
                server's own, or what another has stored meanwhile.
        """
        self._peer = peer
        self._retry_s = retry_s
        self._model_digest = model_digest
        self._transforms = transforms
        self._on_calibration = on_calibration
        self._queue: queue.Queue[Run | None] = queue.Queue(QUEUE_PAGES)
        self._is_over = threading.Event()
        # The statistics of a large model take gigabytes: nobody but the thread holds them.
        self._thread = threading.Thread(target=self._run, args=(statistics,), name="kvcodec-calibrate", daemon=True)
        self._thread.start()

    def wants_pages(self) -> bool:
        """Whether it would take a page that is offered now."""
        return not self._is_over.is_set() and not self._queue.full()

    def offer(self, values: Mapping[Side, torch.Tensor], first_position: int) -> None:
        """Offers a page for the statistics; returns at once, having copied the page if it is taken.

        Args:
            values: per side ``(layers, page_tokens, kv_heads, head_dim)`` in host memory.
            first_position: of the page's first token.
        """
        if not self.wants_pages():
            return
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(({side: tensor.clone() for side, tensor in values.items()}, first_position))

    def stop(self) -> None:
        """Gives up what was gathered, without waiting: it is not what this server's KV looks like any more."""
        self._is_over.set()
        # A thread that waits finds an empty queue.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def close(self) -> None:
        """Ends the thread, unless it is in the middle of a computation: that ends with the process."""
        self.stop()
        self._thread.join(timeout=5)

    def wait(self, timeout_s: float) -> bool:
        """Waits until this is over; for tests."""
        return self._is_over.wait(timeout_s)

    # ---- the thread ----

    def _run(self, statistics: KVStatistics) -> None:
        be_nice(NICENESS)
        try:
            sample = self._gather(statistics)
            if not self._is_over.is_set():
                self._settle(statistics, sample)
        except KVCodecError as error:
            self._give_up(error.reason, str(error))
        except Exception:
            # A thread's top: the server goes on uncalibrated.
            logger.exception("kvcodec: no calibration could be made")
            self._give_up("failed", "an error that nobody thought of")
        finally:
            self._is_over.set()
            metrics.CALIBRATION_TOKENS.set(0)

    def _give_up(self, outcome: str, why: str) -> None:
        metrics.CALIBRATIONS.labels(outcome=outcome).inc()
        logger.warning("kvcodec: this server stays uncalibrated (%s): %s", outcome, why)

    def _gather(self, statistics: KVStatistics) -> list[Run]:
        """Adds pages until there are enough, or until this is over; some of the last pages."""
        needed = int(TOKENS_MARGIN * tokens_needed(statistics.layout, statistics.layers_per_block))
        logger.info("kvcodec: a calibration will be made from the first %d tokens that are published", needed)
        sample: collections.deque[Run] = collections.deque(maxlen=SAMPLE_PAGES)
        while statistics.tokens < needed:
            run = self._queue.get()
            if run is None or self._is_over.is_set():
                break
            tokens = statistics.tokens
            statistics.add(*run)
            metrics.CALIBRATION_TOKENS.set(statistics.tokens)
            if statistics.tokens - tokens == self._transforms.spec.page_tokens:
                # All of its values are finite.
                sample.append(run)
        return list(sample)

    def _settle(self, statistics: KVStatistics, sample: list[Run]) -> None:
        """Uses what another server has stored meanwhile, else makes one and stores it."""
        found = self._stored()
        if found is None and not self._is_over.is_set():
            logger.info("kvcodec: computing a calibration from %d tokens", statistics.tokens)
            if not sample:
                raise CalibrationError("no page without values that are not finite")
            made = calibrate_by_noise(statistics, sample, self._model_digest, {"made_by": "auto-calibrate"})
            # Computing takes its time. Whoever was first has made the one that all use.
            found = self._stored()
            if found is None and not self._is_over.is_set():
                self._transforms.add(made)
                self._store(made)
                self._use(made, MADE)
        if found is not None:
            self._use(found, USED)

    def _stored(self) -> Calibration | None:
        """The peer's, which the transforms know then; None if one may be put, or this is over.

        Raises:
            CalibrationError: the peer has one that can't be used here, and is not to be replaced.
        """
        while not self._is_over.is_set():
            found = search_calibration(self._peer, lambda: self._model_digest, self._transforms)
            if found.calibration is not None or found.outcome in _REPLACEABLE:
                return found.calibration
            if found.outcome not in _UNANSWERED:
                raise CalibrationError(f"the one that the peer has can't be used: {found.why}")
            self._is_over.wait(self._retry_s)
        return None

    def _store(self, made: Calibration) -> None:
        """Puts a calibration, however long the peer is away.

        Raises:
            PeerRejectedError: the peer has no room for it. Pages that nobody else could read are not to be made.
        """
        while not self._is_over.is_set():
            try:
                self._peer.put_calibration(self._model_digest, made.encoded)
            except PeerRejectedError:
                raise
            except PeerError as error:
                logger.debug("kvcodec: the calibration could not be stored yet: %s", error)
                self._is_over.wait(self._retry_s)
            else:
                return

    def _use(self, calibration: Calibration, outcome: str) -> None:
        if self._is_over.is_set():
            return
        metrics.CALIBRATIONS.labels(outcome=outcome).inc()
        logger.info(
            "kvcodec: profile %r is calibrated from now on (%s): artifact %s, %d bytes",
            ",".join(self._transforms.tiers),
            outcome,
            calibration.digest.hex()[:16],
            len(calibration.encoded),
        )
        self._on_calibration(calibration)
