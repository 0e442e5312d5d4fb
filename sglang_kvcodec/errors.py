"""Every error this package raises on purpose.

KVCodecError
├── ConfigurationError            (ValueError)      what the operator asked for can't be had: refuse to start
│   └── UnsupportedError                            a model, pool or SGLang version that is not supported
├── CalibrationError              (RuntimeError)    a calibration can't be made of what was gathered
├── FormatError                   (ValueError)      bytes that are not what they should be: a counted miss
│   ├── TruncatedError                              shorter or longer than they say
│   ├── ChecksumError                               damaged
│   ├── ForeignPageError                            another page, model, profile or geometry than asked for
│   └── UnknownFormatError                          a version, stage or field this version does not know
├── ArrivalError                  (RuntimeError)    bytes that were waited for do not come any more
├── NotFoundError                 (LookupError)     what was asked for by its name is not there
├── AccessError                   (PermissionError) a peer's client may not do what it asks
│   ├── UnauthenticatedError                        it shows no token that is known and not expired
│   └── ForbiddenError                              its token has not the scope
├── ClientLimitError              (RuntimeError)    a peer's client takes more than its share
├── CodecError                    (RuntimeError)    an encoder or decoder failed
│   └── EncoderDiedError                            the process that was encoding is gone
├── StorageError                  (RuntimeError)
│   ├── CapacityError                               the object can't fit; nothing was stored
│   └── StorageUnavailableError                     disk full, read-only, engine gone
└── PeerError                     (ConnectionError)
    ├── PeerUnavailableError                        no peer to talk to
    │   └── PeerUntrustedError                      no TLS connection: a certificate is not accepted
    ├── PeerTimeoutError          (TimeoutError)    a phase of an RPC took too long
    └── PeerRejectedError                           the peer refused the request itself
        └── PeerDeniedError                         the token is missing, unknown, expired, or lacks a scope
"""

from __future__ import annotations


class KVCodecError(Exception):
    """Base of all errors of this package."""

    @property
    def reason(self) -> str:
        """A short stable word for metric labels, e.g. ``checksum``."""
        name = type(self).__name__.removesuffix("Error")
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


class ConfigurationError(KVCodecError, ValueError):
    """What the operator asked for can't be had."""


class UnsupportedError(ConfigurationError):
    """A model, pool or SGLang version that is not supported."""


class CalibrationError(KVCodecError, RuntimeError):
    """A calibration can't be made of what was gathered."""


class FormatError(KVCodecError, ValueError):
    """Bytes that are not what they should be."""


class TruncatedError(FormatError):
    """Shorter or longer than they say."""


class ChecksumError(FormatError):
    """Damaged bytes or planes."""


class ForeignPageError(FormatError):
    """Another page, model, profile or geometry than asked for."""


class UnknownFormatError(FormatError):
    """A version, stage or field that this version does not know."""


class ArrivalError(KVCodecError, RuntimeError):
    """Bytes that were waited for do not come any more."""


class RestoreTimeoutError(KVCodecError, TimeoutError):
    """Decoding what a forward pass waits for takes too long."""


class NotFoundError(KVCodecError, LookupError):
    """What was asked for by its name is not there."""


class AccessError(KVCodecError, PermissionError):
    """A peer's client may not do what it asks."""


class UnauthenticatedError(AccessError):
    """The client shows no token that is known and not expired."""


class ForbiddenError(AccessError):
    """The client's token has not the scope."""


class ClientLimitError(KVCodecError, RuntimeError):
    """A peer's client takes more than its share."""


class CodecError(KVCodecError, RuntimeError):
    """An encoder or decoder failed."""


class EncoderDiedError(CodecError):
    """The process that was encoding is gone."""


class StorageError(KVCodecError, RuntimeError):
    """A storage engine failed."""


class CapacityError(StorageError):
    """The object can't fit; nothing was stored."""


class StorageUnavailableError(StorageError):
    """The engine can't serve: disk full, read-only, gone."""


class PeerError(KVCodecError, ConnectionError):
    """A storage peer could not do what was asked."""


class PeerUnavailableError(PeerError):
    """There is no peer to talk to."""


class PeerUntrustedError(PeerUnavailableError):
    """There is no TLS connection: one side does not accept the other's certificate."""


class PeerTimeoutError(PeerError, TimeoutError):
    """A phase of an RPC took too long."""


class PeerRejectedError(PeerError):
    """The peer refused the request itself."""


class PeerDeniedError(PeerRejectedError):
    """The peer does not accept the token, or there is none."""
