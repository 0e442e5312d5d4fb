"""Bounds of what peer and client say to each other, and the gRPC options that enforce them on both sides."""

from __future__ import annotations

from sglang_kvcodec.config import MIB, Timeouts

ChannelOptions = list[tuple[str, int]]

MAX_PAGES_PER_REQUEST = 1 << 16
"""Pages in one Lookup, Fetch or Delete; objects in one Put."""
DEFAULT_MESSAGE_BYTES = MIB
"""Payload of one Fetch message, and of one chunk of a Put. Every message costs the same; a larger one leaves the caches
between one copy and the next."""
MIN_MESSAGE_BYTES = 16 << 10
MAX_MESSAGE_BYTES = 4 * MIB
GRPC_MESSAGE_BYTES = 8 * MIB
"""gRPC refuses a larger message: above the largest manifest, the largest chunk and the longest list of hashes."""

_FRAME_BYTES = MIB
_READ_CHUNK_BYTES = 256 << 10
_KEEPALIVE_S = 10
_KEEPALIVE_TIMEOUT_S = 5
_HANDSHAKE_S = 10
_CALLS_OF_A_CONNECTION = 1024


def message_bytes(asked: int, most: int = MAX_MESSAGE_BYTES) -> int:
    """The payload of a Fetch message for a client that asks for ``asked`` bytes; 0 asks for the default."""
    return max(MIN_MESSAGE_BYTES, min(asked or DEFAULT_MESSAGE_BYTES, most, MAX_MESSAGE_BYTES))


def _common_options() -> ChannelOptions:
    return [
        ("grpc.max_send_message_length", GRPC_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES),
        # The default frame of 16 KiB and reads of 8 KiB cost a third of the throughput of large messages.
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        ("grpc.experimental.tcp_read_chunk_size", _READ_CHUNK_BYTES),
        ("grpc.experimental.tcp_max_read_chunk_size", 4 * _READ_CHUNK_BYTES),
    ]


def server_options() -> ChannelOptions:
    """Options of the peer's gRPC server."""
    return [
        *_common_options(),
        # A connection that never gets as far as HTTP/2 is closed, and none holds any number of calls open.
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_S * 1000),
        ("grpc.max_concurrent_streams", _CALLS_OF_A_CONNECTION),
        # Two peers on one port would share the calls between two stores.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_S * 500),
        ("grpc.keepalive_time_ms", _KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_S * 1000),
    ]


def channel_options(timeouts: Timeouts) -> ChannelOptions:
    """Options of a client's channel."""
    connect_ms = max(1, int(timeouts.connect_s * 1000))
    return [
        *_common_options(),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", _KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_S * 1000),
        # The lower bound of the back-off is also how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", connect_ms),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", max(connect_ms, 1000)),
        # The caller's thread drives a response stream itself, without a hand-over per message.
        ("SingleThreadedUnaryStream", 1),
    ]
