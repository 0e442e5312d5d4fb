"""Objects of a bucket of an S3-compatible store, with the library's errors in our words."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import obstore
import obstore.exceptions
from obstore.store import S3Store

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError

_CONNECT_TIMEOUT = datetime.timedelta(seconds=5)
_ANSWER_TIMEOUT = datetime.timedelta(seconds=60)
_RETRY: Any = {
    "max_retries": 3,
    "retry_timeout": datetime.timedelta(seconds=20),
    "backoff": {
        "base": 2,
        "init_backoff": datetime.timedelta(milliseconds=50),
        "max_backoff": datetime.timedelta(seconds=2),
    },
}
_MIB = 1 << 20
_MULTIPART_BYTES = 16 * _MIB
"""Larger objects are put in parts where no condition is needed."""
_PART_BYTES = 8 * _MIB
_PARTS_AT_ONCE = 16
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclasses.dataclass(frozen=True)
class S3Address:
    """Where a store is.

    Attributes:
        bucket: its name.
        prefix: of all names in it; empty for the whole bucket.
        endpoint: URL of a store that is not Amazon's; None for Amazon, or what ``AWS_ENDPOINT_URL`` says.
        region: of the bucket; None for what ``AWS_REGION`` says.
        index_url: of the Redis that has the index of a store that peers share; None if one peer has it for itself.
    """

    bucket: str
    prefix: str
    endpoint: str | None
    region: str | None
    index_url: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def parse(cls, location: str) -> S3Address:
        """The address in ``s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&index=URL]``.

        The URL of an index is written as it is, up to the next ``&``, or percent-encoded as a whole.

        Raises:
            ConfigurationError: not such an address.
        """
        url = urllib.parse.urlsplit(location)
        # An index may be a URL that has parts of its own encoded: each value is decoded where it is known what it is.
        options = dict(option.partition("=")[::2] for option in url.query.split("&") if option)
        endpoint, region = (_decoded(options.pop(name, None)) for name in ("endpoint", "region"))
        index_url = options.pop("index", None)
        if index_url is not None and "://" not in index_url:
            index_url = _decoded(index_url)
        if options and index_url is not None:
            # Not named: they may be what follows an & in a password.
            raise ConfigurationError("an S3 store has only endpoint, region and index; encode an index that has an &")
        if options:
            raise ConfigurationError(
                f"an S3 store has no option {', '.join(options)}; there are endpoint, region and index"
            )
        prefix = url.path.strip("/")
        if not _BUCKET.fullmatch(url.netloc) or not (prefix == "" or _PREFIX.fullmatch(prefix)):
            raise ConfigurationError("not an S3 store; write s3://BUCKET/PREFIX")
        if endpoint is not None and not re.fullmatch(r"https?://[^/@]+/?", endpoint):
            raise ConfigurationError(f"not an endpoint: {endpoint!r}; write https://HOST")
        return cls(url.netloc, prefix, endpoint, region, index_url)


def _decoded(value: str | None) -> str | None:
    return None if value is None else urllib.parse.unquote(value)


class FoundObject(NamedTuple):
    """One line of a listing."""

    name: str
    size_bytes: int
    modified_at_s: float


class S3Bucket:
    """Whole objects under names. Credentials come from ``AWS_*`` or the machine's role. Thread-safe."""

    def __init__(self, address: S3Address) -> None:
        """Connects with the first call.

        Raises:
            ConfigurationError: the library refuses the address or the environment.
        """
        self.where = f"s3://{address.bucket}/{address.prefix}"
        options: dict[str, Any] = {"region": address.region or None}
        if address.endpoint is not None:
            options |= {"endpoint": address.endpoint.rstrip("/"), "virtual_hosted_style_request": False}
        client = {
            "allow_http": address.endpoint is not None and address.endpoint.startswith("http:"),
            "connect_timeout": _CONNECT_TIMEOUT,
            "timeout": _ANSWER_TIMEOUT,
        }
        try:
            self._store: Any = S3Store(
                address.bucket,
                prefix=address.prefix or None,
                client_options=client,
                retry_config=_RETRY,
                **{name: value for name, value in options.items() if value is not None},
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise ConfigurationError(f"can't use {self.where}: {error}") from error

    def create(self, name: str, value: bytes) -> bool:
        """Stores an object unless there is one, in one request, by a condition that the store checks.

        Never in parts, whatever the size: the library has no condition for those. S3 takes 5 GB in one request.
        """
        try:
            with self._errors_in_our_words():
                obstore.put(self._store, name, value, mode="create", use_multipart=False)
        except _ExistsError:
            return False
        return True

    def replace(self, name: str, value: bytes) -> None:
        """Stores an object, whatever is there; a large one in parts, several at once.

        The parts of an upload that fails are deleted if the store still answers; those of a process that dies stay,
        unseen, until a rule of the bucket deletes them.
        """
        with self._errors_in_our_words():
            obstore.put(
                self._store,
                name,
                value,
                mode="overwrite",
                use_multipart=len(value) > _MULTIPART_BYTES,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def get(self, name: str) -> bytes | None:
        """An object, None if there is none."""
        try:
            with self._errors_in_our_words():
                return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes ``[start, stop)`` of an object, None if there is none."""
        try:
            with self._errors_in_our_words():
                return bytes(obstore.get_range(self._store, name, start=start, end=stop))
        except FileNotFoundError:
            return None

    def head(self, name: str) -> FoundObject | None:
        """An object's size and time, None if there is none."""
        try:
            with self._errors_in_our_words():
                return _found(obstore.head(self._store, name))
        except FileNotFoundError:
            return None

    def delete(self, names: Sequence[str]) -> None:
        """Deletes objects; one that is not there is no error."""
        with self._errors_in_our_words(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, list(names))

    def list(self, folder: str) -> Iterator[list[FoundObject]]:
        """All objects of a folder, a thousand at a time."""
        with self._errors_in_our_words():
            for batch in obstore.list(self._store, folder, chunk_size=1000):
                yield [_found(meta) for meta in batch]

    @contextlib.contextmanager
    def _errors_in_our_words(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except obstore.exceptions.AlreadyExistsError as error:
            raise _ExistsError from error
        except (obstore.exceptions.BaseError, OSError) as error:
            # The library's text has the whole request in it.
            words = str(error).split("\n\nDebug source", 1)[0][:500]
            raise StorageUnavailableError(f"the store {self.where} failed: {words}") from error


class _ExistsError(Exception):
    pass


def _found(meta: Any) -> FoundObject:
    return FoundObject(meta["path"], meta["size"], meta["last_modified"].timestamp())
