"""Bearer tokens of a peer's clients: a TOML file of their hashes, read again when it changes.

The file never holds a token, only its SHA-256. A token is 32 random bytes, so nobody finds one by trying, and a plain
hash of it can't be turned back.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import logging
import os
import pathlib
import re
import secrets
import time
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import ConfigurationError

logger = logging.getLogger(__name__)

SCOPES = ("read", "write", "admin")
"""``read``: look up and fetch. ``write``: put, and delete pages. ``admin``: list and read what is stored, delete
calibrations, and, where the token is of no tenant, what concerns all of them, as the counts of the store. None of them
includes another one."""
MAX_TOKENS = 1000
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SECRET_FIELD, _TOKENS_FIELD = "tenant_secret", "token"
_TOKEN_PREFIX = "kvc_"


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """What is known of one token.

    Attributes:
        name: of the client, for logs and limits; of one token alone.
        sha256: of the token, 32 bytes.
        scopes: of :data:`SCOPES`.
        tenant: whose pages and calibrations it sees; empty for the default tenant.
        expires_at_s: Unix time; None for never.
    """

    name: str
    sha256: bytes
    scopes: frozenset[str]
    tenant: str = ""
    expires_at_s: float | None = None

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at_s is not None and time.time() >= self.expires_at_s


class TokenTable:
    """The tokens of one state of the file."""

    def __init__(self, entries: Sequence[TokenEntry], tenant_secret: bytes) -> None:
        self.entries = tuple(entries)
        self._known = frozenset(entries)
        self.tenant_secret = tenant_secret
        """What the storage keys of all tenants but the default one are derived with."""

    @classmethod
    def parse(cls, text: str) -> TokenTable:
        """The tokens that a file with this text has.

        Raises:
            ConfigurationError: with what is wrong in it.
        """
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"not TOML: {error}") from error
        _require_known(fields, {_SECRET_FIELD, _TOKENS_FIELD}, "the file")
        listed = fields.get(_TOKENS_FIELD, [])
        if not isinstance(listed, list) or len(listed) > MAX_TOKENS:
            raise ConfigurationError(f"write each token as [[{_TOKENS_FIELD}]], at most {MAX_TOKENS}")
        entries = [_entry(each, number) for number, each in enumerate(listed, 1)]
        for field in ("name", "sha256"):
            if len({getattr(entry, field) for entry in entries}) < len(entries):
                raise ConfigurationError(f"two tokens have the same {field}")
        secret = fields.get(_SECRET_FIELD, "")
        if not isinstance(secret, str) or not re.fullmatch(r"([0-9a-f]{64})?", secret):
            raise ConfigurationError(f"{_SECRET_FIELD} is 64 hexadecimal digits in lower case")
        if not secret and any(entry.tenant for entry in entries):
            raise ConfigurationError(f"tokens of tenants need a {_SECRET_FIELD}: `kvcodec token` writes one")
        return cls(entries, bytes.fromhex(secret))

    def __contains__(self, entry: TokenEntry) -> bool:
        """Whether it has this very entry."""
        return entry in self._known

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token, whether or not it is expired. Takes as long for each token and for none."""
        presented = hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.sha256, presented):
                found = entry
        return found


class TokenFile:
    """The tokens that are valid now."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the file.

        Raises:
            ConfigurationError: it can't be read, or says something wrong.
        """
        self._path = path
        self._stamp = _stamp(path)
        self.table = _read(path)
        if not self.table.entries:
            logger.warning("%s has no tokens: nobody is let in", path)

    def reload_if_changed(self, at_once: bool = False) -> None:
        """Reads the file again if it was changed, or ``at_once``; the tokens stay as they are if it is wrong."""
        stamp = _stamp(self._path)
        if stamp == self._stamp and not at_once:
            return
        self._stamp = stamp
        try:
            self.table = _read(self._path)
        except ConfigurationError as error:
            logger.error("the tokens of before stay valid: %s", error)
            peer_metrics.PEER_TOKEN_RELOADS.labels("failed").inc()
        else:
            logger.info("read %d tokens from %s", len(self.table.entries), self._path)
            peer_metrics.PEER_TOKEN_RELOADS.labels("ok").inc()

    def admits(self, entry: TokenEntry) -> bool:
        """Whether a token that was let in before would be let in again, as it was."""
        return not entry.is_expired and entry in self.table


def new_token() -> str:
    """A token that nobody has."""
    return _TOKEN_PREFIX + secrets.token_urlsafe(32)


def append_entry(path: pathlib.Path, entry: TokenEntry) -> str:
    """Adds a token to the file, and a secret for tenants where it has none; the text that was added.

    The file is replaced whole, so that a peer never reads half of it. It is created for its owner alone.

    Raises:
        ConfigurationError: the file is wrong, or would be, or can't be written.
    """
    try:
        before = path.read_text() if path.exists() else ""
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"can't read {path}: {error}") from error
    lines = [
        f"[[{_TOKENS_FIELD}]]",
        f'name = "{entry.name}"',
        f'sha256 = "{entry.sha256.hex()}"',
        "scopes = [{}]".format(", ".join(f'"{scope}"' for scope in SCOPES if scope in entry.scopes)),
    ]
    if entry.tenant:
        lines.append(f'tenant = "{entry.tenant}"')
    if entry.expires_at_s is not None:
        expires = datetime.datetime.fromtimestamp(entry.expires_at_s, datetime.UTC)
        lines.append(f"expires = {expires:%Y-%m-%dT%H:%M:%SZ}")
    added = "\n".join(lines) + "\n"
    try:
        has_secret = bool(TokenTable.parse(before).tenant_secret)
        # Before all tables: behind one it would belong to that.
        head = "" if has_secret else f'{_SECRET_FIELD} = "{secrets.token_hex(32)}"\n'
        text = f"{head}{before.rstrip()}\n\n{added}".lstrip()
        TokenTable.parse(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "w") as file:
                file.write(text)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"can't write {path}: {error.strerror}") from error
    return added


def _read(path: pathlib.Path) -> TokenTable:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"can't read the tokens of {path}: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigurationError(f"the tokens of {path}: more than {_MAX_FILE_BYTES} bytes")
    try:
        return TokenTable.parse(data.decode())
    except (ConfigurationError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the tokens of {path}: {error}") from error


def _stamp(path: pathlib.Path) -> tuple[int, ...] | None:
    """Changes when the file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _entry(fields: Any, number: int) -> TokenEntry:
    where = f"token {number}"
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{where} is not a table")
    _require_known(fields, {"name", "sha256", "scopes", "tenant", "expires"}, where)
    name, sha256, scopes = fields.get("name"), fields.get("sha256"), fields.get("scopes")
    tenant, expires = fields.get("tenant", ""), fields.get("expires")
    require_name(name, f"the name of {where}")
    if tenant != "":
        require_name(tenant, f"the tenant of {where}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ConfigurationError(f"sha256 of {where} is not 64 hexadecimal digits in lower case")
    if not isinstance(scopes, list) or not scopes or any(scope not in SCOPES for scope in scopes):
        raise ConfigurationError(f"scopes of {where} are some of {', '.join(SCOPES)}")
    if expires is not None and (not isinstance(expires, datetime.datetime) or expires.tzinfo is None):
        raise ConfigurationError(f"expires of {where} is a time with its zone, e.g. 2027-01-31T00:00:00Z")
    expires_at_s = None if expires is None else expires.timestamp()
    return TokenEntry(str(name), bytes.fromhex(sha256), frozenset(scopes), str(tenant), expires_at_s)


def require_name(name: Any, what: str) -> None:
    """Refuses what can't name a token or a tenant: it becomes the name of a directory.

    Raises:
        ConfigurationError: with ``what`` it should have been.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"{what} is 1 to 64 letters, digits, dots, dashes and underscores, not {name!r}")


def _require_known(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigurationError(f"{where} has the unknown field {unknown[0]!r}")
