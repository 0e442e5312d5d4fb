"""What the page is told, as plain values for JSON. Bounded, however much is stored and whoever calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from sglang_kvcodec import __version__, peer_metrics
from sglang_kvcodec.format.namespace import NAMESPACE_BYTES
from sglang_kvcodec.rpc.client_tallies import ClientTallies
from sglang_kvcodec.rpc.hot_prefixes import HotPrefixes
from sglang_kvcodec.status import readings
from sglang_kvcodec.status.history import History

PERIOD_S = 2.0
"""How often counters are looked at. The page asks as often."""
HISTORY_S = 300.0
_PREFIXES_SHOWN = 10
_CLIENTS_SHOWN = 20
_METHODS, _OUTCOMES = ("Lookup", "Fetch"), ("stored", "missing")


@dataclasses.dataclass(frozen=True)
class PeerFacts:
    """What of a peer is not in its metrics.

    Attributes:
        address: where it serves.
        store: what it was told to keep objects in, without a password.
        is_draining: whether it is about to end.
        clients: what each client has done.
        prefixes: what is asked for.
    """

    address: Callable[[], str]
    store: str
    is_draining: Callable[[], bool]
    clients: ClientTallies
    prefixes: HotPrefixes


class StatusReport:
    """Samples the peer's counters and tells how it is. For one thread; what it reads is safe to read from any."""

    def __init__(self, facts: PeerFacts) -> None:
        """Of the peer that has these ``facts``; its counters are those of the process."""
        self._facts = facts
        self._started_s = time.monotonic()
        self._history = History(int(HISTORY_S / PERIOD_S) + 1)

    def sample(self, now_s: float | None = None) -> None:
        """Looks at the counters; to be called every :data:`PERIOD_S`. ``now_s`` is of the monotonic clock."""
        self._history.add(time.monotonic() if now_s is None else now_s, readings.counts())

    def to_dict(self) -> dict[str, Any]:
        """How the peer is now."""
        now_s = time.monotonic()
        return {
            "peer": self._peer(now_s),
            "store": {
                "objects": readings.value(peer_metrics.STORE_OBJECTS),
                "stored_bytes": readings.value(peer_metrics.STORE_BYTES),
                "capacity_bytes": readings.value(peer_metrics.STORE_CAPACITY_BYTES),
                "evictions": readings.value(peer_metrics.STORE_EVICTIONS),
                "calibration_bytes": readings.value(peer_metrics.STORE_CALIBRATION_BYTES),
                "calibration_capacity_bytes": readings.value(peer_metrics.STORE_CALIBRATION_CAPACITY_BYTES),
            },
            "recent_s": self._history.span_s,
            "pages": self._pages(),
            "traffic": self._traffic(),
            "prefixes": self._prefixes(now_s),
            "clients": self._clients(now_s),
            "errors": self._errors(),
        }

    def _peer(self, now_s: float) -> dict[str, Any]:
        is_ready = readings.value(peer_metrics.PEER_READY) > 0
        expires_at_s = readings.value(peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS)
        return {
            "address": self._facts.address(),
            "store": self._facts.store,
            "version": __version__,
            "state": "draining" if self._facts.is_draining() else "ready" if is_ready else "not ready",
            "uptime_s": now_s - self._started_s,
            "certificate_expires_at_s": expires_at_s or None,
            "certificate_left_s": expires_at_s - time.time() if expires_at_s else None,
        }

    def _pages(self) -> dict[str, Any]:
        so_far = readings.by_labels(peer_metrics.PEER_ASKED_PAGES)
        return {
            method: {
                "recent": {
                    outcome: self._history.increase(readings.pages_name(method, outcome)) for outcome in _OUTCOMES
                },
                "all": {outcome: so_far.get((method, outcome), 0) for outcome in _OUTCOMES},
            }
            for method in _METHODS
        }

    def _traffic(self) -> dict[str, Any]:
        return {
            "period_s": PERIOD_S,
            "history_s": HISTORY_S,
            "sent_bytes": readings.value(peer_metrics.PEER_SENT_BYTES),
            "received_bytes": readings.value(peer_metrics.PEER_RECEIVED_BYTES),
            "sent_bytes_per_s": [round(rate) for rate in self._history.rates(readings.SENT)],
            "received_bytes_per_s": [round(rate) for rate in self._history.rates(readings.RECEIVED)],
            "streams": {
                method: number for (method,), number in readings.by_labels(peer_metrics.PEER_STREAMS).items() if number
            },
        }

    def _prefixes(self, now_s: float) -> list[dict[str, Any]]:
        return [
            {
                "namespace": use.key[:NAMESPACE_BYTES].hex(),
                "page": use.key[NAMESPACE_BYTES:].hex(),
                "pages": use.pages,
                "lookups": use.lookups,
                "idle_s": now_s - use.used_at_s,
            }
            for use in self._facts.prefixes.top(_PREFIXES_SHOWN)
        ]

    def _clients(self, now_s: float) -> dict[str, Any]:
        return {
            "count": len(self._facts.clients),
            "shown": [
                {
                    "name": tally.name,
                    "open_calls": tally.open_calls,
                    "calls": tally.calls,
                    "sent_bytes": tally.sent_bytes,
                    "received_bytes": tally.received_bytes,
                    "idle_s": now_s - tally.called_at_s,
                }
                for tally in self._facts.clients.top(_CLIENTS_SHOWN)
            ],
        }

    def _errors(self) -> list[dict[str, Any]]:
        found = [
            {
                "what": what,
                "reason": reason,
                "recent": self._history.increase(readings.error_name(what, reason)),
                "all": number,
            }
            for (what, reason), number in readings.errors().items()
        ]
        return sorted(found, key=lambda error: (-error["recent"], -error["all"], error["what"], error["reason"]))
