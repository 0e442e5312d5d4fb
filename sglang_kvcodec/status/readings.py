"""What the peer's metrics say now, in plain numbers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Gauge

from sglang_kvcodec import peer_metrics

SENT, RECEIVED = "sent_bytes", "received_bytes"
_ERROR = "error"


def value(metric: Counter | Gauge) -> float:
    """Of a metric, all its labels together."""
    return sum(number for _, number in _samples(metric))


def by_labels(metric: Counter | Gauge) -> dict[tuple[str, ...], float]:
    """Of each combination of labels, in the order of the metric's label names."""
    return dict(_samples(metric))


def pages_name(method: str, outcome: str) -> str:
    """What :func:`counts` calls the pages that ``method`` asked for with ``outcome``."""
    return f"pages {method} {outcome}"


def counts() -> dict[str, float]:
    """Every counter that the page shows over time, by name; those of :func:`errors` as well."""
    found = {SENT: value(peer_metrics.PEER_SENT_BYTES), RECEIVED: value(peer_metrics.PEER_RECEIVED_BYTES)}
    for (method, outcome), number in by_labels(peer_metrics.PEER_ASKED_PAGES).items():
        found[pages_name(method, outcome)] = number
    for (what, reason), number in errors().items():
        found[error_name(what, reason)] = number
    return found


def error_name(what: str, reason: str) -> str:
    """What :func:`counts` calls an entry of :func:`errors`."""
    return f"{_ERROR} {what} {reason}"


def errors() -> dict[tuple[str, str], float]:
    """How often something went wrong since the start: what, and why, and how often. What never did is left out."""
    found = {
        **{
            (method, status): number
            for (method, status), number in by_labels(peer_metrics.PEER_RPCS).items()
            if status not in ("OK", "CANCELLED")
        },
        **{("refused", reason): number for (reason,), number in by_labels(peer_metrics.PEER_REFUSED).items()},
        **{
            ("Put", outcome): number
            for (outcome,), number in by_labels(peer_metrics.PEER_PUTS).items()
            if outcome in ("rejected", "no_capacity")
        },
        **{
            (f"store {method}", reason): number
            for (method, reason), number in by_labels(peer_metrics.STORE_ERRORS).items()
        },
        **{("damaged object", reason): number for (reason,), number in by_labels(peer_metrics.STORE_DAMAGED).items()},
        **{
            ("damaged calibration", reason): number
            for (reason,), number in by_labels(peer_metrics.STORE_CALIBRATIONS_DAMAGED).items()
        },
        ("tokens", "not read"): _failed(peer_metrics.PEER_TOKEN_RELOADS),
        ("certificates", "not read"): _failed(peer_metrics.PEER_CERTIFICATE_RELOADS),
    }
    return {name: number for name, number in found.items() if number}


def _failed(reloads: Counter) -> float:
    return by_labels(reloads).get(("failed",), 0)


def _samples(metric: Counter | Gauge) -> Iterator[tuple[tuple[str, ...], float]]:
    for family in metric.collect():
        for sample in family.samples:
            # Beside each count there is the time at which it began.
            if not sample.name.endswith("_created"):
                yield tuple(sample.labels.values()), sample.value
