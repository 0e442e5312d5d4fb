"""A storage peer over gRPC, as an SGLang server sees it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grpc

from sglang_kvcodec import metrics
from sglang_kvcodec.config import MAX_ARTIFACT_BYTES, MAX_OBJECT_BYTES, Access, Timeouts, parse_remote
from sglang_kvcodec.errors import (
    ConfigurationError,
    FormatError,
    PeerDeniedError,
    PeerError,
    PeerRejectedError,
    PeerTimeoutError,
    PeerUnavailableError,
)
from sglang_kvcodec.format.digest import Buffer, artifact_digest
from sglang_kvcodec.format.exchange import (
    CalibrationEntry,
    FetchEvent,
    LookupResult,
    PeerStat,
    Progress,
    PutOutcome,
    PutResult,
)
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.calibration_messages import CalibrationReceipt, calibration_entries, put_messages
from sglang_kvcodec.rpc.channels import Metadata, TokenSource, open_channel, tls_files_stamp
from sglang_kvcodec.rpc.errors import peer_error
from sglang_kvcodec.rpc.heap import keep_freed_memory
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.message_pace import MessagePace
from sglang_kvcodec.rpc.replies import FetchChecks, lookup_result, put_results
from sglang_kvcodec.rpc.watch import CallWatch, Verdict, WatchedCall
from sglang_kvcodec.rpc.wire import decode_fetch, encode_chunk

logger = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Peer"].full_name


class GrpcPeer:
    """Implements ``format.exchange.PeerTransport``; see there. One connection, opened by the first call."""

    def __init__(
        self,
        remote: str,
        timeouts: Timeouts | None = None,
        max_message_bytes: int = 0,
        access: Access | None = None,
    ) -> None:
        """Connects lazily. Has glibc keep freed memory, see ``rpc/heap.py``.

        Args:
            remote: ``grpc://HOST:PORT``, or ``grpcs://HOST:PORT`` by TLS.
            timeouts: how long each phase may take.
            max_message_bytes: asks for smaller or larger messages of a Fetch; 0 leaves it to the peer, but on a slow
                link.
            access: certificates and token; the files are read now, the token's again when it changes, and the
                certificates' when they have changed and there is no connection.

        Raises:
            ConfigurationError: not such a URL, or ``access`` does not go with it, or one of its files can't be used.
        """
        self._address = parse_remote(remote)
        access = access or Access()
        access.require_fit(remote)
        keep_freed_memory()
        self._timeouts = timeouts or Timeouts()
        self._max_message_bytes = max_message_bytes
        self._pace = MessagePace(DEFAULT_MESSAGE_BYTES)
        self._closed = False
        self._answered = False
        self._watch = CallWatch()
        self._token = TokenSource(access.token_file)
        self._remote, self._access = remote, access
        self._opening = threading.Lock()
        self._files = tls_files_stamp(access)
        self._retired: grpc.Channel | None = None
        self._use(open_channel(remote, access, self._timeouts))

    def _use(self, channel: grpc.Channel) -> None:
        self._channel = channel
        unary = channel.unary_unary
        self._lookup = unary(f"/{_SERVICE}/Lookup", pb.LookupRequest.SerializeToString, pb.LookupResponse.FromString)
        self._delete = unary(f"/{_SERVICE}/Delete", pb.DeleteRequest.SerializeToString, pb.DeleteResponse.FromString)
        self._stat = unary(f"/{_SERVICE}/Stat", pb.StatRequest.SerializeToString, pb.StatResponse.FromString)
        self._fetch = channel.unary_stream(f"/{_SERVICE}/Fetch", pb.FetchRequest.SerializeToString)
        self._put = channel.stream_unary(f"/{_SERVICE}/Put", None, pb.PutResponse.FromString)
        self._put_calibration = channel.stream_unary(
            f"/{_SERVICE}/PutCalibration", None, pb.PutCalibrationResponse.FromString
        )
        self._get_calibration = channel.unary_stream(
            f"/{_SERVICE}/GetCalibration", pb.GetCalibrationRequest.SerializeToString
        )
        self._list_calibrations = unary(
            f"/{_SERVICE}/ListCalibrations",
            pb.ListCalibrationsRequest.SerializeToString,
            pb.ListCalibrationsResponse.FromString,
        )
        self._delete_calibration = unary(
            f"/{_SERVICE}/DeleteCalibration",
            pb.DeleteCalibrationRequest.SerializeToString,
            pb.DeleteCalibrationResponse.FromString,
        )

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the peer."""
        return self._address

    @property
    def channel(self) -> grpc.Channel:
        """The connection, for other services of the peer. It is another one after certificates were renewed."""
        return self._channel

    @property
    def call_metadata(self) -> Metadata:
        """What a call shows the peer, for other services of the peer."""
        return self._token.metadata()

    def lookup(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> LookupResult:
        """Which of the pages are stored."""
        request = pb.LookupRequest(namespace_digest=namespace_digest, page_hashes=b"".join(page_hashes))
        with self._translated("Lookup"):
            response = self._lookup(request, **self._terms(self._timeouts.lookup_s))
            return lookup_result(response, len(page_hashes))

    def delete(self, namespace_digest: bytes, page_hashes: Sequence[bytes]) -> int:
        """Deletes pages; how many there were."""
        request = pb.DeleteRequest(namespace_digest=namespace_digest, page_hashes=b"".join(page_hashes))
        with self._translated("Delete"):
            # A request may wait for it, as for a Lookup.
            response = self._delete(request, **self._terms(self._timeouts.lookup_s))
            return int(response.deleted_pages)

    def stat(self) -> PeerStat:
        """The peer's account of itself."""
        with self._translated("Stat"):
            stat = self._stat(pb.StatRequest(), **self._terms(self._timeouts.progress_s))
            return PeerStat(
                stat.objects,
                stat.stored_bytes,
                stat.capacity_bytes,
                stat.evicted_objects,
                stat.engine,
                stat.format_version,
                stat.software_version,
            )

    def fetch(
        self, namespace_digest: bytes, page_hashes: Sequence[bytes], cancelled: threading.Event | None = None
    ) -> Generator[FetchEvent, None, None]:
        """The pages; the call starts with the first ``next`` and ends with the iterator."""
        request = pb.FetchRequest(
            namespace_digest=namespace_digest,
            page_hashes=b"".join(page_hashes),
            max_message_bytes=self._max_message_bytes or self._pace.wanted_bytes(),
        )
        checks = FetchChecks(page_hashes)
        with self._translated("Fetch"):
            call = self._fetch(request, timeout=self._timeouts.fetch_s, metadata=self._token.metadata())
            watched = WatchedCall(call, self._timeouts.progress_s, cancelled)
            try:
                first_s, received_bytes = 0.0, 0
                for message in self._messages(call, watched):
                    now_s = time.monotonic()
                    if first_s:
                        received_bytes += len(message)
                        self._pace.watch(received_bytes, now_s - first_s)
                    else:
                        first_s = now_s
                    for event in decode_fetch(message):
                        checks.check(event)
                        yield event
            finally:
                call.cancel()

    def put(self, namespace_digest: bytes, objects: Sequence[tuple[bytes, bytes]]) -> list[PutResult]:
        """Stores ``(page_hash, object)`` pairs in one call; one result each."""
        sent = [(PageKey(namespace_digest, page_hash), data) for page_hash, data in objects]
        fitting = [(key, data) for key, data in sent if len(data) <= MAX_OBJECT_BYTES]
        results = iter(self._put_all(fitting) if fitting else [])
        too_large = PutResult(PutOutcome.REJECTED, f"larger than {MAX_OBJECT_BYTES} bytes")
        return [next(results) if len(data) <= MAX_OBJECT_BYTES else too_large for _, data in sent]

    def put_calibration(self, model_digest: bytes, artifact: Buffer, progress: Progress | None = None) -> bytes:
        """Stores a calibration artifact; its SHA-256. ``progress`` is called in another thread."""
        with self._translated("PutCalibration"):
            if not 0 < len(artifact) <= MAX_ARTIFACT_BYTES:
                raise PeerRejectedError(f"a calibration has 1 to {MAX_ARTIFACT_BYTES} bytes, not {len(artifact)}")
            digest = artifact_digest(artifact)
            messages = put_messages(model_digest, digest, artifact, progress)
            response = self._upload("PutCalibration", self._put_calibration, messages, self._timeouts.calibration_s)
            if response.digest != digest:
                raise FormatError("another calibration was stored")
            return digest

    def get_calibration(
        self, model_digest: bytes, digest: bytes | None = None, progress: Progress | None = None
    ) -> bytes | None:
        """A model's calibration artifact, the current one unless ``digest`` names another; None if there is none."""
        request = pb.GetCalibrationRequest(model_digest=model_digest, digest=digest or b"")
        receipt = CalibrationReceipt(digest, progress)
        with self._translated("GetCalibration"):
            metadata = self._token.metadata()
            call = self._get_calibration(request, timeout=self._timeouts.calibration_s, metadata=metadata)
            watched = WatchedCall(call, self._timeouts.progress_s, None)
            try:
                for message in self._messages(call, watched, "GetCalibration"):
                    receipt.add(message)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return None
                raise
            finally:
                call.cancel()
            return receipt.artifact()

    def list_calibrations(self) -> list[CalibrationEntry]:
        """All calibration artifacts of the peer."""
        with self._translated("ListCalibrations"):
            terms = self._terms(self._timeouts.progress_s)
            return calibration_entries(self._list_calibrations(pb.ListCalibrationsRequest(), **terms))

    def delete_calibration(self, model_digest: bytes, digest: bytes) -> bool:
        """Deletes a calibration artifact; whether it was there."""
        request = pb.DeleteCalibrationRequest(model_digest=model_digest, digest=digest)
        with self._translated("DeleteCalibration"):
            response = self._delete_calibration(request, **self._terms(self._timeouts.progress_s))
            return bool(response.deleted)

    def close(self) -> None:
        """Ends every call under way with ``PeerUnavailableError``. May be called twice."""
        with self._opening:
            self._closed = True
            for channel in (self._channel, self._retired):
                if channel is not None:
                    channel.close()
        self._watch.close()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Waits for a connection, trying again as the back-off allows.

        Raises:
            PeerUnavailableError: there was none in time.
        """
        with self._translated("connect"):
            try:
                grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
            except grpc.FutureTimeoutError:
                # A call knows why there is none, a certificate that is not accepted for instance.
                self._stat(pb.StatRequest(), **self._terms(self._timeouts.progress_s))

    def _open_anew_if_renewed(self) -> None:
        """A channel keeps the certificates that it was opened with: after they are renewed there has to be another."""
        with self._opening:
            files = tls_files_stamp(self._access)
            if self._closed or files == self._files:
                return
            self._files = files
            try:
                channel = open_channel(self._remote, self._access, self._timeouts)
            except ConfigurationError as error:
                logger.warning("kvcodec: the certificates of before stay in use: %s", error)
                return
            # Calls that are under way end on the old one, which is closed when there is the next.
            if self._retired is not None:
                self._retired.close()
            self._retired = self._channel
            self._use(channel)

    def _put_all(self, objects: Sequence[tuple[PageKey, bytes]]) -> list[PutResult]:
        with self._translated("Put"):
            response = self._upload("Put", self._put, _put_messages(objects), self._timeouts.put_s)
            return put_results(response, len(objects))

    def _upload(
        self, rpc: str, method: grpc.StreamUnaryMultiCallable, serialized: Iterator[bytes], timeout_s: float
    ) -> Any:
        """The answer to a stream of messages, under watch."""
        started = threading.Event()
        watched: WatchedCall | None = None

        def messages() -> Iterator[bytes]:
            # gRPC asks for the next message when it has taken the last: each is a sign of life from the peer.
            started.wait()
            for message in serialized:
                if watched is not None:
                    watched.waiting()
                yield message
            if watched is not None:
                watched.waiting()

        call = method.future(messages(), timeout=timeout_s, metadata=self._token.metadata())
        watched = WatchedCall(call, self._timeouts.progress_s, None)
        self._watch.add(watched)
        started.set()
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise self._ended(watched, rpc) from None
        except grpc.RpcError:
            if watched.verdict is not None:
                raise self._ended(watched, rpc) from None
            raise
        finally:
            self._watch.remove(watched)
            call.cancel()

    def _messages(self, call: Iterator[bytes], watched: WatchedCall, rpc: str = "Fetch") -> Iterator[bytes]:
        """The messages of a response stream under watch; ends early where the caller has cancelled."""
        self._watch.add(watched)
        try:
            while True:
                watched.waiting()
                message = next(call, None)
                watched.heard()
                if message is None or watched.given_up:
                    return
                self._answered = True
                yield message
        except grpc.RpcError:
            if watched.verdict is Verdict.CANCELLED:
                return
            if watched.verdict is Verdict.SILENT:
                raise self._ended(watched, rpc) from None
            raise
        finally:
            self._watch.remove(watched)

    def _ended(self, watched: WatchedCall, rpc: str) -> PeerError:
        if watched.verdict is Verdict.SILENT:
            return PeerTimeoutError(f"{rpc} at {self._address}: silent for {self._timeouts.progress_s} s")
        return PeerUnavailableError(f"{rpc} at {self._address}: the client was closed")

    def _terms(self, phase_s: float) -> dict[str, Any]:
        """Deadline and token of a call. One that may have to connect first gets the time for it."""
        timeout_s = phase_s if self._answered else self._timeouts.connect_s + phase_s
        return {"timeout": timeout_s, "metadata": self._token.metadata()}

    @contextlib.contextmanager
    def _translated(self, rpc: str) -> Iterator[None]:
        """Turns whatever goes wrong on the way into one of the three errors, and counts it."""
        try:
            if self._closed:
                raise PeerUnavailableError(f"{rpc} at {self._address}: the client is closed")
            try:
                yield
                self._answered = True
            except grpc.RpcError as error:
                raise peer_error(error.code(), error.details(), rpc, self._address) from error
            except FormatError as error:
                raise PeerRejectedError(f"{rpc} at {self._address}: a senseless answer: {error}") from error
            except ValueError as error:
                # What grpc raises for a call on a channel that another thread has just closed.
                if not self._closed:
                    raise
                raise PeerUnavailableError(f"{rpc} at {self._address}: the client was closed") from error
        except PeerError as error:
            if not isinstance(error, PeerRejectedError):
                self._answered = False
            if isinstance(error, PeerDeniedError):
                self._token.look_again()
            if isinstance(error, PeerUnavailableError):
                self._open_anew_if_renewed()
            metrics.PEER_ERRORS.labels(rpc.lower(), error.reason).inc()
            raise


def _put_messages(objects: Sequence[tuple[PageKey, bytes]]) -> Iterator[bytes]:
    commit = pb.PutRequest(commit=True).SerializeToString()
    for key, data in objects:
        begin = pb.PutBegin(namespace_digest=key.namespace_digest, page_hash=key.page_hash, object_bytes=len(data))
        yield pb.PutRequest(begin=begin).SerializeToString()
        view = memoryview(data)
        for start in range(0, len(data), DEFAULT_MESSAGE_BYTES):
            yield encode_chunk(view[start : start + DEFAULT_MESSAGE_BYTES])
        yield commit
