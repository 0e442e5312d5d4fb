"""What a client sends and gets of calibration artifacts, checked: it trusts a peer no more than a peer trusts it."""

from __future__ import annotations

import io
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.digest import Buffer
from sglang_kvcodec.format.exchange import CalibrationEntry, Progress
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.storage.artifacts import ArtifactCheck, require_digest, require_digests, require_size

_LAST_MS = 253_402_300_799_999


def put_messages(model_digest: bytes, digest: bytes, artifact: Buffer, progress: Progress | None) -> Iterator[bytes]:
    """The serialized messages of a PutCalibration."""
    begin = pb.PutCalibrationBegin(model_digest=model_digest, digest=digest, size_bytes=len(artifact))
    yield pb.PutCalibrationRequest(begin=begin).SerializeToString()
    view = memoryview(artifact)
    for start in range(0, len(view), DEFAULT_MESSAGE_BYTES):
        chunk = bytes(view[start : start + DEFAULT_MESSAGE_BYTES])
        yield pb.PutCalibrationRequest(chunk=chunk).SerializeToString()
        if progress is not None:
            progress(start + len(chunk), len(view))
    yield pb.PutCalibrationRequest(commit=True).SerializeToString()


class CalibrationReceipt:
    """The artifact that a GetCalibration brings. What is announced is never allocated before it has come."""

    def __init__(self, digest: bytes | None, progress: Progress | None) -> None:
        """Expects the artifact named ``digest``, or any."""
        self._digest = digest
        self._progress = progress
        self._size_bytes = 0
        self._check: ArtifactCheck | None = None
        # Grows with what comes, and gives it up at the end without a copy.
        self._content = io.BytesIO()

    def add(self, data: bytes) -> None:
        """Takes the next serialized message.

        Raises:
            FormatError: not one that can come now, or an artifact that was not asked for.
        """
        message = pb.GetCalibrationResponse()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise FormatError(f"not a calibration's message: {error}") from error
        step = message.WhichOneof("step")
        if step == "begin" and self._check is None:
            self._begin(message.begin)
        elif step == "chunk" and self._check is not None:
            self._check.add(message.chunk)
            self._content.write(message.chunk)
            if self._progress is not None:
                self._progress(self._size_bytes - self._check.left_bytes, self._size_bytes)
        else:
            raise FormatError("a calibration comes as its begin, then chunks")

    def artifact(self) -> bytes:
        """The artifact, once all messages have come.

        Raises:
            TruncatedError: bytes are missing.
            ChecksumError: they have not the digest that names them.
        """
        if self._check is None:
            raise FormatError("a calibration without a begin")
        self._check.require_whole()
        return self._content.getvalue()

    def _begin(self, begin: pb.GetCalibrationBegin) -> None:
        require_size(begin.size_bytes)
        require_digest(begin.digest)
        if self._digest is not None and begin.digest != self._digest:
            raise FormatError(f"calibration {begin.digest.hex()} instead of {self._digest.hex()}")
        self._size_bytes = begin.size_bytes
        self._check = ArtifactCheck(begin.digest, begin.size_bytes)


def calibration_entries(response: pb.ListCalibrationsResponse) -> list[CalibrationEntry]:
    """The answer to a ListCalibrations.

    Raises:
        FormatError: names, sizes or times that no artifact has.
    """
    entries = []
    for each in response.calibrations:
        require_digests(each.model_digest, each.digest)
        require_size(each.size_bytes)
        if each.stored_at_ms > _LAST_MS:
            raise FormatError(f"{each.stored_at_ms} ms is after the year 9999")
        entries.append(
            CalibrationEntry(each.model_digest, each.digest, each.size_bytes, each.stored_at_ms, each.is_current)
        )
    return entries
