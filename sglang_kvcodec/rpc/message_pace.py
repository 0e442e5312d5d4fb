"""How large messages of a Fetch are to be: small on a slow link, so that what has arrived shows how fast it is."""

from __future__ import annotations

MESSAGE_S = 0.02
"""A message is to take so long on the link."""
LEAST_BYTES = 16 << 10
FIRST_BYTES = 128 << 10
"""While nothing is known of the link: a larger message may take so long on a slow one that it looks dead."""
LEAST_WATCHED_S = 0.005
"""What came within less says nothing of the link."""


class MessagePace:
    """Watches the messages of one client's fetches. Threads may share it: they only blur what it says."""

    def __init__(self, most_bytes: int) -> None:
        """Knows nothing. ``most_bytes`` is the size of messages on a fast link."""
        self._most_bytes = most_bytes
        self._bytes_per_s = 0.0

    def wanted_bytes(self) -> int:
        """Of the next messages; 0 for as large as the peer likes."""
        wanted = int(self._bytes_per_s * MESSAGE_S) if self._bytes_per_s else FIRST_BYTES
        if wanted >= self._most_bytes:
            return 0
        return max(LEAST_BYTES, wanted)

    def watch(self, received_bytes: int, elapsed_s: float) -> None:
        """So much of a call has arrived since its first message, without that one."""
        if elapsed_s >= LEAST_WATCHED_S or received_bytes >= self._most_bytes:
            self._bytes_per_s = received_bytes / max(elapsed_s, 1e-6)
