"""One Fetch after another, measured and traced."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

from sglang_kvcodec.flow.rates import LinkMeter
from sglang_kvcodec.flow.receiver import bytes_of
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.exchange import FetchedMissing, FetchEvent, PeerTransport


class Transfers:
    """From one peer."""

    def __init__(self, peer: PeerTransport, link: LinkMeter, tracer: Tracer) -> None:
        """None yet."""
        self._peer = peer
        self._link = link
        self._tracer = tracer

    def events(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], stop: threading.Event, rid: str
    ) -> Generator[FetchEvent, None, None]:
        """The events of the Fetch of some pages.

        Args:
            namespace_digest: of all of them.
            page_hashes: which.
            stop: ends it.
            rid: of the request, for the trace.

        Raises:
            PeerError: the peer fails.
        """
        transfer = self._link.transfer()
        start_s, received_bytes = time.monotonic(), 0
        events = self._peer.fetch(namespace_digest, page_hashes, stop)
        try:
            for event in events:
                if not isinstance(event, FetchedMissing):
                    transfer.received(bytes_of(event))
                    received_bytes += bytes_of(event)
                yield event
        finally:
            events.close()
            transfer.end()
            self._tracer.span(rid, "wire", start_s, time.monotonic(), bytes=received_bytes, pages=len(page_hashes))
            self._tracer.counter("link", bytes_per_s=self._link.bytes_per_s() or 0.0)
