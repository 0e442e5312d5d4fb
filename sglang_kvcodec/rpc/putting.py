"""One object of a Put: received in order, checked whole, then stored."""

from __future__ import annotations

from sglang_kvcodec.errors import CapacityError, FormatError, StorageUnavailableError, TruncatedError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.exchange import PutOutcome, PutResult
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.storage.base import StorageEngine

OUTCOMES = {
    PutOutcome.STORED: pb.PUT_OUTCOME_STORED,
    PutOutcome.ALREADY_STORED: pb.PUT_OUTCOME_ALREADY_STORED,
    PutOutcome.REJECTED: pb.PUT_OUTCOME_REJECTED,
    PutOutcome.NO_CAPACITY: pb.PUT_OUTCOME_NO_CAPACITY,
}
OUTCOMES_BACK = {number: outcome for outcome, number in OUTCOMES.items()}

_SMALL_CHUNK_BYTES = 16 << 10
"""Smaller chunks are gathered, so that a client that sends bytes singly does not cost many times its bytes."""


class IncomingObject:
    """The chunks of an announced object so far. What is announced is never allocated before it has come."""

    def __init__(self, key: PageKey, object_bytes: int) -> None:
        self.key = key
        self.object_bytes = object_bytes
        self.chunks: list[Buffer] = []
        self._received_bytes = 0

    def add(self, chunk: memoryview) -> None:
        """Takes the next bytes.

        Raises:
            FormatError: an empty chunk, or more than was announced.
        """
        if not chunk:
            raise FormatError("a chunk without bytes")
        self._received_bytes += len(chunk)
        if self._received_bytes > self.object_bytes:
            raise FormatError(f"page {self.key}: more than the announced {self.object_bytes} bytes")
        if len(chunk) >= _SMALL_CHUNK_BYTES:
            self.chunks.append(chunk)
        elif self.chunks and isinstance(self.chunks[-1], bytearray):
            self.chunks[-1] += chunk
        else:
            self.chunks.append(bytearray(chunk))

    def check_complete(self) -> None:
        """Refuses a commit before the last byte.

        Raises:
            TruncatedError: bytes are missing.
        """
        if self._received_bytes != self.object_bytes:
            raise TruncatedError(
                f"page {self.key}: committed after {self._received_bytes} of the announced {self.object_bytes} bytes"
            )


def store_object(engine: StorageEngine, incoming: IncomingObject) -> PutResult:
    """Checks every byte of a committed object and stores it. Blocking; for a pool of threads."""
    try:
        incoming.check_complete()
        data = b"".join(incoming.chunks)
        PageObject(data, expected=incoming.key)
    except FormatError as error:
        return PutResult(PutOutcome.REJECTED, f"{error.reason}: {error}")
    try:
        stored = engine.put(incoming.key.to_bytes(), data)
    except (CapacityError, StorageUnavailableError) as error:
        return PutResult(PutOutcome.NO_CAPACITY, str(error))
    return PutResult(PutOutcome.STORED if stored else PutOutcome.ALREADY_STORED)
