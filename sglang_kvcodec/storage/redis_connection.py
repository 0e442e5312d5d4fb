"""Redis or Valkey, one server or a cluster: where it is, and its errors in our words."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import redis
import redis.backoff
import redis.cluster
import redis.exceptions
import redis.retry

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError

PASSWORD_VARIABLE = "KVCODEC_STORE_PASSWORD"
"""Environment variable with the password, so that it is not on a command line."""
_DEFAULT_PORT = 6379
_DEFAULT_PREFIX = "kvcodec"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
_RETRIES = 2
_EVICTING_POLICY = re.compile(r"allkeys-\w+")


@dataclasses.dataclass(frozen=True)
class RedisAddress:
    """Where a store is.

    Attributes:
        nodes: host and port; of a cluster those to ask for the others.
        is_cluster: whether they are nodes of a cluster.
        database: number of the database, 0 in a cluster.
        prefix: of the names of all keys of the store.
        tls: whether to connect by TLS, checked against the system's certificates.
        username: to log in with.
        password: the same.
    """

    nodes: tuple[tuple[str, int], ...]
    is_cluster: bool
    database: int
    prefix: str
    tls: bool
    username: str | None
    password: str | None = dataclasses.field(repr=False)

    @classmethod
    def parse(cls, scheme: str, location: str) -> RedisAddress:
        """The address in ``redis://[USER[:PASSWORD]@]HOST[:PORT][/DB][?prefix=NAME]`` and its like.

        Args:
            scheme: ``redis``, ``rediss`` (by TLS), ``rediscluster`` or ``redisscluster``.
            location: what follows the colon. A cluster takes several ``HOST:PORT``, separated by commas.

        Raises:
            ConfigurationError: not such an address.
        """
        url = urllib.parse.urlsplit("//" + location.removeprefix("//"))
        user, _, hosts = url.netloc.rpartition("@")
        username, _, password = (urllib.parse.unquote(part) for part in user.partition(":"))
        is_cluster = scheme.endswith("cluster")
        nodes = tuple(_parse_node(host) for host in hosts.split(","))
        if len(nodes) > 1 and not is_cluster:
            raise ConfigurationError("redis:// takes one server; for several nodes of a cluster write rediscluster://")
        database = url.path.strip("/")
        if not re.fullmatch(r"\d{0,4}", database) or (is_cluster and database):
            raise ConfigurationError(f"not the number of a Redis database: {database!r}; a cluster has none")
        options = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        prefix = options.pop("prefix", _DEFAULT_PREFIX)
        if options:
            raise ConfigurationError(f"a Redis store has no option {', '.join(options)}; there is prefix")
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(f"a Redis store's prefix is of letters, digits, '.', '_' and '-', not {prefix!r}")
        return cls(
            nodes,
            is_cluster,
            int(database or 0),
            prefix,
            scheme.startswith("rediss"),
            username or None,
            password or os.environ.get(PASSWORD_VARIABLE) or None,
        )


def _parse_node(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", text)
    port = int(match[2] or _DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise ConfigurationError(f"not the address of a Redis server: {text!r}; write HOST:PORT")
    return match[1].strip("[]"), port


class RedisConnection:
    """Connections to the servers, opened as needed; thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        """Connects.

        Raises:
            ConfigurationError: the servers evict keys by themselves, or are no cluster where one was asked for.
            StorageUnavailableError: no answer.
        """
        self._address = address
        self._digests: dict[str, str] = {}
        options = {
            "username": address.username,
            "password": address.password,
            "ssl": address.tls,
            "socket_timeout": ANSWER_TIMEOUT_S,
            "socket_connect_timeout": _CONNECT_TIMEOUT_S,
            "retry": redis.retry.Retry(redis.backoff.ExponentialBackoff(cap=0.5, base=0.05), _RETRIES),
        }
        with self.errors_in_our_words():
            self._client: Any
            if address.is_cluster:
                nodes = [redis.cluster.ClusterNode(*node) for node in address.nodes]
                self._client = redis.cluster.RedisCluster(startup_nodes=nodes, **options)
            else:
                host, port = address.nodes[0]
                self._client = redis.Redis(host=host, port=port, db=address.database, **options)
            try:
                self._require_no_evictions()
            except BaseException:
                self._client.close()
                raise

    def call(self, *command: Any, **options: Any) -> Any:
        """One command, sent to the node that has its key."""
        with self.errors_in_our_words():
            return self._client.execute_command(*command, **options)

    def run(self, script: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """One script on keys of one slot."""
        digest = self._digests.setdefault(script, hashlib.sha1(script.encode()).hexdigest())
        with self.errors_in_our_words():
            try:
                return self._client.evalsha(digest, len(keys), *keys, *arguments)
            except redis.exceptions.NoScriptError:
                return self._client.eval(script, len(keys), *keys, *arguments)

    def delete(self, names: Sequence[bytes]) -> None:
        """Deletes keys, whichever nodes have them."""
        with self.errors_in_our_words():
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                pipeline.unlink(name)
            pipeline.execute()

    def scan(self, pattern: bytes) -> Iterator[list[bytes]]:
        """Keys of all nodes that match, some at a time."""
        with self.errors_in_our_words():
            batch: list[bytes] = []
            for name in self._client.scan_iter(match=pattern, count=1000):
                batch.append(name)
                if len(batch) >= 500:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def close(self) -> None:
        """Closes all connections."""
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            self._client.close()

    @contextlib.contextmanager
    def errors_in_our_words(self) -> Iterator[None]:
        """Turns the library's errors into ours."""
        where = ",".join(f"{host}:{port}" for host, port in self._address.nodes)
        try:
            yield
        except redis.exceptions.RedisClusterException as error:
            raise StorageUnavailableError(f"the Redis cluster at {where} failed: {error}") from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise StorageUnavailableError(f"the Redis store at {where} failed: {error}") from error

    def _require_no_evictions(self) -> None:
        target = {"target_nodes": self._client.PRIMARIES} if self._address.is_cluster else {}
        memory = self._client.info("memory", **target)
        nodes = memory.values() if self._address.is_cluster and "maxmemory_policy" not in memory else [memory]
        for node in nodes:
            policy = str(node.get("maxmemory_policy", ""))
            if node.get("maxmemory") and _EVICTING_POLICY.fullmatch(policy):
                raise ConfigurationError(
                    f"a Redis server has the policy {policy}, under which it throws away the index of the store;"
                    " set maxmemory-policy to noeviction, the peer evicts by itself"
                )
