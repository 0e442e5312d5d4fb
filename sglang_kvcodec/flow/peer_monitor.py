"""Knows whether the peer answers, so that nothing ever waits for one that doesn't."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

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

    def __init__(
        self, peer: PeerTransport, retry_s: float, on_round_trip: Callable[[float], None] = lambda seconds: None
    ) -> None:
        """Starts the probing thread.

        Args:
            peer: whom to probe.
            retry_s: time between two probes.
            on_round_trip: told on that thread how many seconds each good probe took.
        """
        self._on_round_trip = on_round_trip
        self._peer = peer
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._is_up = False
        self._is_closed = False
        self._last_complaint = ""
        self.on_up: Callable[[], None] = lambda: None
        """Called on the probing thread each time the peer has come back; must not wait."""
        metrics.PEER_UP.set(0)
        self._thread = threading.Thread(target=self._run, name="kvcodec-peer-monitor", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard of the peer was good."""
        return self._is_up

    def wait_until_up(self, timeout_s: float) -> bool:
        """Waits for the peer; False if it didn't come, or the monitor was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_up or self._is_closed, timeout_s)
            return self._is_up

    def failed(self, rpc: str, error: PeerError) -> None:
        """Tells of a failed call, which the transport has counted. A refused request says nothing against the peer."""
        if isinstance(error, PeerRejectedError):
            logger.warning("kvcodec: the peer refused a %s: %s", rpc, error)
            return
        with self._changed:
            if self._is_up:
                logger.warning("kvcodec: the peer is gone (%s: %s); prefixes are computed until it is back", rpc, error)
            self._set_up(False)

    def close(self) -> None:
        """Stops probing; the peer counts as down from now on, and nobody waits for it any longer."""
        with self._changed:
            self._is_closed = True
            self._set_up(False)
        self._thread.join(timeout=5)

    def _set_up(self, is_up: bool) -> None:
        self._is_up = is_up
        metrics.PEER_UP.set(is_up)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            answers = self._probe()
            with self._changed:
                if self._is_closed:
                    return
                has_come = answers and not self._is_up
                if answers != self._is_up:
                    self._set_up(answers)
            if has_come:
                self.on_up()
            with self._changed:
                # A peer that fails a call is probed again after a full pause, not at once.
                self._changed.wait_for(lambda: self._is_closed, self._retry_s)

    def _probe(self) -> bool:
        start_s = time.monotonic()
        try:
            stat = self._peer.stat()
        except PeerError as error:
            self._complain(f"kvcodec: no peer ({error}); prefixes are computed until it is there")
            return False
        self._on_round_trip(time.monotonic() - start_s)
        if stat.format_version != FORMAT_VERSION:
            self._complain(
                f"kvcodec: the peer keeps format version {stat.format_version}, this server speaks {FORMAT_VERSION}; "
                "prefixes are computed"
            )
            return False
        if not self._is_up:
            logger.info(
                "kvcodec: peer is up: %s, %d pages, %d of %d bytes",
                stat.engine,
                stat.objects,
                stat.stored_bytes,
                stat.capacity_bytes,
            )
        self._last_complaint = ""
        return True

    def _complain(self, text: str) -> None:
        if text != self._last_complaint:
            logger.warning("%s", text)
            self._last_complaint = text
