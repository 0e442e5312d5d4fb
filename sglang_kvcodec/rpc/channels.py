"""A client's connection to a peer: by TLS or in plaintext, as its URL says, and never the one for want of the other."""

from __future__ import annotations

import pathlib
import ssl
import threading
import time

import grpc

from sglang_kvcodec.config import Access, Timeouts, parse_remote, uses_tls
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.certificates import require_certificates
from sglang_kvcodec.rpc.limits import channel_options

_LOOK_EVERY_S = 1.0
_MAX_TOKEN_BYTES = 4096

Metadata = tuple[tuple[str, str], ...]


def open_channel(remote: str, access: Access, timeouts: Timeouts) -> grpc.Channel:
    """A channel to a peer; connects with the first call.

    Raises:
        ConfigurationError: not a URL, or a file of ``access`` can't be read or is not what it should be.
    """
    address, options = parse_remote(remote), channel_options(timeouts)
    if not uses_tls(remote):
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*_tls_files(access)), options=options)


def check_files(access: Access) -> None:
    """Refuses, before anything is connected, files that can't be used.

    Raises:
        ConfigurationError: with what is wrong.
    """
    _tls_files(access)
    TokenSource(access.token_file)


def tls_files_stamp(access: Access) -> tuple[tuple[int, int] | None, ...]:
    """Changes when a file of certificates or keys does."""
    stamps: list[tuple[int, int] | None] = []
    for path in filter(None, (access.tls_ca, access.tls_cert, access.tls_key)):
        try:
            stat = pathlib.Path(path).stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((stat.st_mtime_ns, stat.st_ino))
    return tuple(stamps)


def _tls_files(access: Access) -> tuple[bytes | None, bytes | None, bytes | None]:
    """The peer's CA, the client's key and its certificate."""
    ca = _read(access.tls_ca) if access.tls_ca else None
    if ca is not None:
        require_certificates(ca, pathlib.Path(access.tls_ca))
    if not access.tls_cert:
        return ca, None, None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(access.tls_cert, access.tls_key, password="")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no certificate and key: {access.tls_cert}, {access.tls_key}: {error}") from error
    return ca, _read(access.tls_key), _read(access.tls_cert)


class TokenSource:
    """A client's token, from a file that may be replaced under it. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Reads the file; an empty ``path`` is no token.

        Raises:
            ConfigurationError: it can't be read, or holds no token.
        """
        self._path = path
        self._lock = threading.Lock()
        self._looked_at_s = 0.0
        self._modified_ns = 0
        self._metadata: Metadata = ()
        if path:
            self._metadata = self._read()

    def metadata(self) -> Metadata:
        """What a call shows the peer."""
        if self._path and time.monotonic() - self._looked_at_s > _LOOK_EVERY_S:
            self.look_again()
        return self._metadata

    def look_again(self) -> None:
        """Reads the file again if it was changed. One that is gone or wrong for now leaves the token as it was."""
        if not self._path:
            return
        with self._lock:
            self._looked_at_s = time.monotonic()
            try:
                if pathlib.Path(self._path).stat().st_mtime_ns != self._modified_ns:
                    self._metadata = self._read()
            except (OSError, ConfigurationError):
                # The old token goes on; where it is no longer valid, the peer says so.
                return

    def _read(self) -> Metadata:
        self._looked_at_s = time.monotonic()
        modified_ns = pathlib.Path(self._path).stat().st_mtime_ns if pathlib.Path(self._path).exists() else 0
        token = _read(self._path)[: _MAX_TOKEN_BYTES + 1].strip()
        if not token or len(token) > _MAX_TOKEN_BYTES or not all(0x21 <= byte < 0x7F for byte in token):
            raise ConfigurationError(f"{self._path} does not hold a token: one line of printable ASCII")
        self._modified_ns = modified_ns
        return (("authorization", f"Bearer {token.decode('ascii')}"),)


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"can't read {path}: {error.strerror}") from error
