"""The peer's TLS certificate, read again when its files change, so that it can be renewed under running servers."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import ssl
import threading

import grpc

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import ConfigurationError, FormatError
from sglang_kvcodec.rpc.certificate_time import expires_at_s

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Valid:
    """What the files held when they were last in order."""

    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    expires_at_s: float


class ServerCertificates:
    """What a peer shows its clients, and what it asks of them. Thread-safe.

    gRPC asks for it before each handshake, in threads of its own. Connections that are open stay as they are.
    """

    def __init__(self, certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None = None) -> None:
        """Reads the files.

        Args:
            certificate: PEM: the peer's certificate, then those between it and its CA.
            key: PEM: its private key, not encrypted.
            client_ca: PEM: who signs clients' certificates; clients without one are then refused.

        Raises:
            ConfigurationError: a file can't be read or is not what it should be, or the key is another certificate's.
        """
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._lock = threading.Lock()
        self._contents = self._read()
        self._valid = self._given = self._checked(self._contents)
        peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS.set(self._valid.expires_at_s)

    @property
    def requires_client_certificate(self) -> bool:
        """Whether clients are known by their certificates."""
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a gRPC server."""
        return grpc.dynamic_ssl_server_credentials(
            self._given.configuration, self._renewed, require_client_authentication=self.requires_client_certificate
        )

    def context(self) -> ssl.SSLContext:
        """The same for a connection of another server than gRPC's that begins now."""
        self.reload_if_changed()
        return self._valid.context

    def reload_if_changed(self) -> None:
        """Reads the files again if they have changed. What is wrong is logged, counted and not taken."""
        with self._lock:
            self._reload_if_changed()

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC: what is valid from now on; None as before."""
        with self._lock:
            self._reload_if_changed()
            if self._valid is self._given:
                return None
            self._given = self._valid
            return self._valid.configuration

    def _reload_if_changed(self) -> None:
        try:
            contents = self._read()
            if contents == self._contents:
                return
            # Before the check, so that what is wrong is complained of once.
            self._contents = contents
            self._valid = self._checked(contents)
        except ConfigurationError as error:
            logger.error("the certificate of before stays in use: %s", error)
            peer_metrics.PEER_CERTIFICATE_RELOADS.labels("failed").inc()
            return
        peer_metrics.PEER_CERTIFICATE_EXPIRY_SECONDS.set(self._valid.expires_at_s)
        logger.info("read a new certificate from %s", self._certificate)
        peer_metrics.PEER_CERTIFICATE_RELOADS.labels("ok").inc()

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        paths = (self._certificate, self._key, self._client_ca)
        try:
            certificate, key, client_ca = (None if path is None else path.read_bytes() for path in paths)
        except OSError as error:
            raise ConfigurationError(f"can't read {error.filename}: {error.strerror}") from error
        assert certificate is not None
        assert key is not None
        return certificate, key, client_ca

    def _checked(self, contents: tuple[bytes, bytes, bytes | None]) -> _Valid:
        """Refuses what gRPC would take, and fail each handshake with."""
        certificate, key, client_ca = contents
        try:
            # A password is asked for on the terminal otherwise.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate, self._key, password="")
            ends_at_s = expires_at_s(certificate)
        except (OSError, ValueError, FormatError) as error:
            raise ConfigurationError(f"no certificate and key: {self._certificate}, {self._key}: {error}") from error
        if client_ca is not None:
            require_certificates(client_ca, self._client_ca)
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        return _Valid(grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca), context, ends_at_s)


def require_certificates(pem: bytes, path: pathlib.Path | None) -> None:
    """Refuses what holds no certificate.

    Raises:
        ConfigurationError: with the ``path`` it comes from.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no certificates of a CA: {path}: {error}") from error
