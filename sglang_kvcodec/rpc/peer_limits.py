"""What a peer takes on: in all, and of one client."""

from __future__ import annotations

import dataclasses

from sglang_kvcodec.config import MAX_OBJECT_BYTES


@dataclasses.dataclass(frozen=True)
class PeerLimits:
    """What a peer takes on at once. A client is a token, or, where there are no tokens, an address."""

    max_streams: int = 256
    """Fetch and Put streams; a further one is refused."""
    client_streams: int | None = None
    """The same of one client; None for three quarters of all, so that nobody takes every place."""
    client_bandwidth_bits_per_s: int | None = None
    """Bound of the object bytes that one client sends and is sent, together: what is over it waits."""
    receive_bytes: int = 2 * MAX_OBJECT_BYTES
    """Bytes of announced objects that all Put streams hold together; a further one waits."""
    receive_wait_s: float = 10.0
    idle_s: float = 30.0
    """Longest silence of a client inside a call, and longest time that it may take no message of a Fetch."""
    object_s: float = 120.0
    """Longest time that one object of a Put may keep the peer waiting, all its chunks together."""
    artifact_s: float = 3600.0
    """The same of a calibration."""
    bandwidth_bits_per_s: int | None = None
    """Bound of the object bytes that all Fetch streams send together."""
    read_threads: int = 4
    write_threads: int = 2

    @property
    def streams_of_a_client(self) -> int:
        """Fetch and Put streams of one client."""
        return self.client_streams if self.client_streams is not None else -(-3 * self.max_streams // 4)

    @property
    def receive_bytes_of_a_client(self) -> int:
        """Bytes of announced objects that one client's Put streams hold together: half, or one object."""
        return min(self.receive_bytes, max(MAX_OBJECT_BYTES, self.receive_bytes // 2))
