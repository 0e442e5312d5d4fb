"""Every metric that a storage peer exports with ``--metrics-port``, and shows some of with ``--status-page``.

Apart from ``metrics``: a metric is exported by whoever imports it, and an SGLang server has nothing to say here.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

PEER_RPCS = Counter("kvcodec_peer_rpcs", "RPCs served, by method and gRPC status", ["method", "status"])
PEER_RPC_SECONDS = Histogram("kvcodec_peer_rpc_seconds", "Time of an RPC", ["method"])
PEER_REFUSED = Counter(
    "kvcodec_peer_refused", "Calls refused or ended because of who made them or how much they took", ["reason"]
)
PEER_TOKEN_RELOADS = Counter("kvcodec_peer_token_reloads", "Reads of a changed token file, by outcome", ["outcome"])
PEER_CERTIFICATE_RELOADS = Counter(
    "kvcodec_peer_certificate_reloads", "Reads of changed certificate files, by outcome", ["outcome"]
)
PEER_CERTIFICATE_EXPIRY_SECONDS = Gauge(
    "kvcodec_peer_certificate_expiry_timestamp_seconds",
    "Unix time at which the first of the peer's certificates expires; 0 without TLS",
)
PEER_ASKED_PAGES = Counter(
    "kvcodec_peer_asked_pages", "Pages asked for, by method and whether they were stored", ["method", "outcome"]
)
PEER_SENT_BYTES = Counter("kvcodec_peer_sent_bytes", "Object bytes sent by Fetch")
PEER_RECEIVED_BYTES = Counter("kvcodec_peer_received_bytes", "Object bytes received by Put")
PEER_PUTS = Counter("kvcodec_peer_puts", "Objects put, by outcome", ["outcome"])
PEER_STREAMS = Gauge("kvcodec_peer_streams", "Streams of pages and calibrations open now", ["method"])
PEER_CALIBRATION_SENT_BYTES = Counter("kvcodec_peer_calibration_sent_bytes", "Bytes of calibrations sent")
PEER_CALIBRATION_RECEIVED_BYTES = Counter("kvcodec_peer_calibration_received_bytes", "Bytes of calibrations received")
PEER_READY = Gauge("kvcodec_peer_ready", "1 while it serves: its store answers and it is not shutting down")
PEER_ADMIN_SENT_BYTES = Counter("kvcodec_peer_admin_sent_bytes", "Object bytes read by an operator")
STORE_DAMAGED = Counter("kvcodec_store_damaged", "Stored objects that could not be read and were deleted", ["reason"])
STORE_EXPIRED = Counter("kvcodec_store_expired", "Stored objects deleted because their time was over")
STORE_SCRUBBED_BYTES = Counter("kvcodec_store_scrubbed_bytes", "Bytes of stored objects that the scrub has checked")
STORE_SCRUB_PASSES = Counter("kvcodec_store_scrub_passes", "Passes of the scrub over all stored objects")
STORE_CALL_SECONDS = Histogram("kvcodec_store_call_seconds", "Time of a call of the engine", ["method"])
STORE_ERRORS = Counter("kvcodec_store_errors", "Calls of the engine that failed", ["method", "reason"])
STORE_OBJECTS = Gauge("kvcodec_store_objects", "Page objects stored")
STORE_BYTES = Gauge("kvcodec_store_bytes", "Bytes of page objects stored")
STORE_CAPACITY_BYTES = Gauge("kvcodec_store_capacity_bytes", "Bound of the store")
STORE_EVICTIONS = Counter("kvcodec_store_evictions", "Page objects evicted to make room")
STORE_CALIBRATIONS = Gauge("kvcodec_store_calibrations", "Calibration artifacts stored")
STORE_CALIBRATION_BYTES = Gauge("kvcodec_store_calibration_bytes", "Bytes of calibration artifacts stored")
STORE_CALIBRATION_CAPACITY_BYTES = Gauge("kvcodec_store_calibration_capacity_bytes", "Bound of the calibrations")
STORE_CALIBRATIONS_DAMAGED = Counter(
    "kvcodec_store_calibrations_damaged", "Stored calibrations that were found damaged and deleted", ["reason"]
)
