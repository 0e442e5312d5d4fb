"""Knows whether the peer answers, so that nothing ever waits for one that doesn't."""

from __future__ import annotations

import logging
import threading

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import PeerError, PeerRejectedError
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.namespace import FORMAT_VERSION

logger = logging.getLogger(__name__)


class PeerMonitor:
    """A circuit breaker: opens at the first failed call, closes when a probe in the background succeeds.

    It starts open, so a server whose peer is not there starts and serves as if there were no kvcodec. It goes on
    probing while the peer is up, so that a peer that vanishes is noticed before a request has to wait for it.
    """

    def __init__(self, peer: PeerTransport, retry_s: float) -> None:
        """Starts the probing thread.

        Args:
            peer: whom to probe.
            retry_s: time between two probes.
        """
        self._peer = peer
        self._retry_s = retry_s
        self._up = threading.Event()
        self._down = threading.Event()
        self._down.set()
        self._closed = threading.Event()
        self._last_complaint = ""
        metrics.PEER_UP.set(0)
        self._thread = threading.Thread(target=self._run, name="kvcodec-peer-monitor", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard of the peer was good."""
        return self._up.is_set()

    def wait_until_up(self, timeout_s: float) -> bool:
        """Waits for the peer; False if it didn't come, or the monitor was closed."""
        return self._up.wait(timeout_s) and not self._closed.is_set()

    def failed(self, rpc: str, error: PeerError) -> None:
        """Tells of a failed call. A refused request says nothing against the peer's health."""
        metrics.PEER_ERRORS.labels(rpc=rpc, reason=error.reason).inc()
        if isinstance(error, PeerRejectedError):
            logger.warning("kvcodec: the peer refused a %s: %s", rpc, error)
            return
        if self._up.is_set():
            logger.warning("kvcodec: the peer is gone (%s: %s); prefixes are computed until it is back", rpc, error)
        self._up.clear()
        metrics.PEER_UP.set(0)
        self._down.set()

    def close(self) -> None:
        """Stops probing."""
        self._closed.set()
        self._down.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._probe():
                self._down.clear()
                if not self._up.is_set():
                    logger.info("kvcodec: the peer is up")
                    self._up.set()
                    metrics.PEER_UP.set(1)
                self._down.wait(self._retry_s)
            self._closed.wait(self._retry_s if self._down.is_set() else 0)

    def _probe(self) -> bool:
        try:
            stat = self._peer.stat()
        except PeerError as error:
            if self._up.is_set():
                self.failed("stat", error)
            else:
                self._complain(f"kvcodec: no peer yet ({error}); prefixes are computed until it is there")
            return False
        if stat.format_version != FORMAT_VERSION:
            self._complain(
                f"kvcodec: the peer keeps format version {stat.format_version}, this server speaks {FORMAT_VERSION}; "
                "prefixes are computed"
            )
            return False
        self._last_complaint = ""
        return True

    def _complain(self, text: str) -> None:
        if text != self._last_complaint:
            logger.warning("%s", text)
            self._last_complaint = text
