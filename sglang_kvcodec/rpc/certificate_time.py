"""When certificates expire. The standard library tells that of a connection's other side only, not of a file.

So the one field is read here, out of DER that OpenSSL has accepted before.
"""

from __future__ import annotations

import base64
import datetime
import re

from sglang_kvcodec.errors import FormatError

_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.+?)-----END", re.DOTALL)
_EXPLICIT_VERSION = 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_FIELDS_BEFORE_VALIDITY = 3
"""Serial number, algorithm of the signature, issuer."""


def expires_at_s(pem: bytes) -> float:
    """Unix time at which the first of the certificates in ``pem`` expires.

    Raises:
        FormatError: there is none, or one that is cut or no certificate.
    """
    found = [_certificate_expires_at_s(base64.b64decode(block)) for block in _PEM.findall(pem)]
    if not found:
        raise FormatError("no certificate")
    return min(found)


def _certificate_expires_at_s(der: bytes) -> float:
    try:
        _, certificate, _ = _element(der)
        _, fields, _ = _element(certificate)
        if fields[0] == _EXPLICIT_VERSION:
            _, _, fields = _element(fields)
        for _ in range(_FIELDS_BEFORE_VALIDITY):
            _, _, fields = _element(fields)
        _, validity, _ = _element(fields)
        _, _, not_after = _element(validity)
        tag, text, _ = _element(not_after)
        return _time_s(tag, text.decode("ascii"))
    except (IndexError, ValueError) as error:
        raise FormatError("no certificate") from error


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag and contents of the first element, and what comes after it."""
    tag, length, start = der[0], der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start], "big")
    if start + length > len(der):
        raise ValueError("cut off")
    return tag, der[start : start + length], der[start + length :]


def _time_s(tag: int, text: str) -> float:
    if tag == _UTC_TIME:
        # Two digits of the year, RFC 5280: 50 to 99 are of the last century.
        text = ("19" if text >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC).timestamp()
