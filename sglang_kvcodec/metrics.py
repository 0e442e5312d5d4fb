"""Every metric that an SGLang server with kvcodec exports; those of a storage peer are in ``peer_metrics``.

The objects are Prometheus metrics in the registry of the process; ``--enable-metrics`` shows them on SGLang's own
``/metrics`` page.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STAGE_BUCKETS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Of the stages of a request, so that one can be held against another: from a round trip to a restore's time-out."""

# ---- an SGLang server's read side ----
LOOKUP_PAGES = Counter("kvcodec_lookup_pages", "Pages asked for at the peer", ["outcome"])
FETCHES = Counter("kvcodec_fetches", "Prefix fetches by how they ended", ["outcome"])
FETCHED_BYTES = Counter("kvcodec_fetched_bytes", "Coded bytes received from the peer", ["tier"])
LOOKUP_SECONDS = Histogram(
    "kvcodec_lookup_seconds", "Time to find out which pages of a request the peer has", buckets=STAGE_BUCKETS
)
QUEUED_FETCHES = Gauge("kvcodec_queued_fetches", "Planned fetches that wait for a thread", multiprocess_mode="livesum")
HELD_REQUESTS = Gauge("kvcodec_held_requests", "Requests that wait for their pages", multiprocess_mode="livesum")
FETCH_SECONDS = Histogram("kvcodec_fetch_seconds", "Time from queueing a request to its last fetched page")
MISSES = Counter("kvcodec_misses", "Pages that were not used although asked for, by reason", ["reason"])
RESTORED_TOKENS = Counter("kvcodec_restored_tokens", "Tokens restored into the KV pool", ["tier"])
RESTORED_BYTES = Counter("kvcodec_restored_bytes", "Bytes of KV written into the pool by restoring", ["tier"])
RESTORE_SECONDS = Histogram(
    "kvcodec_restore_seconds", "Time from starting a request's restore to its last layer", buckets=STAGE_BUCKETS
)
QUEUED_RESTORE_PARTS = Gauge(
    "kvcodec_queued_restore_parts", "Parts of restores that wait for a thread", multiprocess_mode="livesum"
)
LAYER_WAIT_SECONDS = Histogram(
    "kvcodec_layer_wait_seconds", "What a forward pass waited for layers being restored", buckets=STAGE_BUCKETS
)
FORWARD_SECONDS = Histogram("kvcodec_forward_seconds", "Time of a prefill pass", buckets=STAGE_BUCKETS)
DECODE_SECONDS = Histogram("kvcodec_decode_seconds", "Time to decode one segment")
DECODERS_REPLACED = Counter("kvcodec_decoders_replaced", "Hardware decoders given up because they failed")
DECODER_BYTES = Gauge(
    "kvcodec_decoder_bytes", "GPU memory taken by hardware decoders at start", multiprocess_mode="livesum"
)
GPU_MEMORY_BYTES = Gauge(
    "kvcodec_gpu_memory_bytes",
    "GPU memory beside SGLang's pool: bound, taken by decoders at start, estimates for restoring and packing",
    ["part"],
    multiprocess_mode="livesum",
)
BACKEND = Gauge(
    "kvcodec_backend", "1 for what pictures are coded with", ["direction", "name"], multiprocess_mode="livemax"
)
RESTORE_FAILURES = Counter("kvcodec_restore_failures", "Restores that failed after admission; recomputed", ["reason"])
HOST_CACHE_BYTES = Gauge("kvcodec_host_cache_bytes", "Page objects held in host memory", multiprocess_mode="livesum")
PEER_UP = Gauge("kvcodec_peer_up", "1 while the peer answers", multiprocess_mode="livemin")
PEERS_UP = Gauge("kvcodec_peers_up", "Of several peers, those that answer", multiprocess_mode="livemin")
FETCH_SWITCHES = Counter("kvcodec_fetch_switches", "Pages asked of another peer as well because one was silent or slow")
FOLLOWING_REQUESTS = Counter("kvcodec_following_requests", "Requests that waited for one that fetched the same pages")
PEER_ERRORS = Counter("kvcodec_peer_errors", "Failed RPCs by kind", ["rpc", "reason"])

# ---- planning ----
PLANS = Counter("kvcodec_plans", "Requests by what was planned for their stored prefix, and why", ["reason"])
PLANNED_TIERS = Counter("kvcodec_planned_tiers", "Fetches by the tier that was planned", ["tier"])
TIER_SWITCHES = Counter("kvcodec_tier_switches", "Fetches that went on with another tier, by that tier", ["tier"])
FETCH_CUTS = Counter("kvcodec_fetch_cuts", "Fetches given up because computing became faster, by phase", ["phase"])
AHEAD_RESTORES = Counter(
    "kvcodec_ahead_restores_total",
    "Requests whose pages were restored while they waited, because others use the model, by what came of it.",
    ["outcome"],
)
MEETINGS = Counter(
    "kvcodec_meetings", "Prefixes of which the start was computed while the end was fetched, by outcome", ["outcome"]
)
JOINED_TOKENS = Counter("kvcodec_joined_tokens", "Tokens that were fetched while those before them were computed")
EXPLORATIONS = Counter("kvcodec_explorations", "Fetches that no request waited for, made to measure the link")
TTFT_PREDICTED_SECONDS = Histogram(
    "kvcodec_ttft_predicted_seconds", "What the planner expected from queueing to the first token", ["choice"]
)
FETCHES_TURNED = Counter("kvcodec_fetches_turned", "Fetches that went on from the other end when the link failed")
EARLY_ADMISSIONS = Counter("kvcodec_early_admissions", "Requests admitted before all of their pages had arrived")
TTFT_SECONDS = Histogram("kvcodec_ttft_seconds", "What it took the same requests", ["choice"])
SCHEDULER_SECONDS = Histogram(
    "kvcodec_scheduler_seconds",
    "What kvcodec took of the scheduler's thread in one scheduling pass",
    buckets=(2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
)
LINK_BYTES_PER_SECOND = Gauge(
    "kvcodec_link_bytes_per_second", "Estimated bandwidth from the peer", multiprocess_mode="livemin"
)
ROUND_TRIP_SECONDS = Gauge(
    "kvcodec_round_trip_seconds", "Estimated round trip to the peer", multiprocess_mode="livemax"
)
RESTORE_BYTES_PER_SECOND = Gauge(
    "kvcodec_restore_bytes_per_second",
    "Estimated coded bytes decoded and restored, all threads together",
    multiprocess_mode="livemin",
)
PREFILL_TOKENS_PER_SECOND = Gauge(
    "kvcodec_prefill_tokens_per_second", "Estimated rate of computing 1024 tokens", multiprocess_mode="livemin"
)
TRACE_DROPS = Counter("kvcodec_trace_drops", "Events left out of the trace for want of room")

CALIBRATIONS = Counter("kvcodec_calibrations", "Calibrations asked for or made, by what came of it", ["outcome"])
CALIBRATION_TOKENS = Gauge(
    "kvcodec_calibration_tokens", "Tokens gathered for a calibration of this server's own", multiprocess_mode="livesum"
)

# ---- an SGLang server's write side ----
PUBLISHED_PAGES = Counter("kvcodec_published_pages", "Pages offered to the peer, by outcome", ["outcome", "tier"])
PUBLISHED_BYTES = Counter("kvcodec_published_bytes", "Coded bytes stored at the peer", ["tier"])
PUBLISHED_KV_BYTES = Counter("kvcodec_published_kv_bytes", "The same pages as uncoded KV bytes", ["tier"])
WRITE_BACK_PAGES = Counter(
    "kvcodec_write_back_pages",
    "Coded pages kept in host memory while the peer was away, by what became of them",
    ["outcome"],
)
WRITE_BACK_KEPT_PAGES = Gauge(
    "kvcodec_write_back_kept_pages", "Of those, the pages that are kept now", multiprocess_mode="livesum"
)
PUBLISH_DROPS = Counter("kvcodec_publish_drops", "Pages not published, by reason", ["reason"])
PUBLISH_QUEUE_BYTES = Gauge(
    "kvcodec_publish_queue_bytes", "Uncoded KV waiting to be encoded", multiprocess_mode="livesum"
)
ENCODER_PROCESSES_LOST = Counter(
    "kvcodec_encoder_processes_lost", "Encoder processes that died or hung and were replaced"
)
ENCODE_SECONDS = Histogram("kvcodec_encode_seconds", "Time to encode one page")
