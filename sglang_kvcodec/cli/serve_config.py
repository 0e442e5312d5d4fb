"""Where the settings of ``kvcodec serve`` come from, and which of them a running peer takes anew at a SIGHUP."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

from sglang_kvcodec.cli import logs
from sglang_kvcodec.cli.settings import Resolved, Settings
from sglang_kvcodec.config import parse_bytes
from sglang_kvcodec.errors import ConfigurationError, KVCodecError
from sglang_kvcodec.rpc.scrub import Scrubber
from sglang_kvcodec.storage.base import StorageEngine
from sglang_kvcodec.storage.registry import without_password

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "KVCODEC_SERVE_"
LIVE = ("capacity", "drain-s", "log-level", "scrub-rate")
"""Settings that a running peer takes anew. All others need a start."""
_CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
_SCRUB_BYTES_PER_S = 4 * 10**6


def add_configuration(
    command: argparse.ArgumentParser,
    settings: Settings,
    run: Callable[[argparse.Namespace, Callable[[], Resolved]], int],
) -> None:
    """Adds ``--config`` and ``--print-config``, and has ``command`` run with the settings from all their places."""
    command.add_argument(
        "--config", metavar="FILE", type=pathlib.Path, help=f"TOML file with settings; also {_CONFIG_VARIABLE}"
    )
    command.add_argument(
        "--print-config", action="store_true", help="print all settings as such a file, and where they are from"
    )

    def run_configured(given: argparse.Namespace) -> int:
        def read() -> Resolved:
            environment = dict(os.environ)
            named = environment.pop(_CONFIG_VARIABLE, None)
            file = given.config or (pathlib.Path(named) if named else None)
            return settings.resolve(given, environment, file)

        resolved = read()
        if given.print_config:
            print(settings.to_toml(resolved, _shown))
            return 0
        return run(resolved.namespace(), read)

    command.set_defaults(run=run_configured)


def _shown(name: str, value: Any) -> Any:
    return without_password(value) if name == "store" and value is not None else value


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """Those of :data:`LIVE`, checked. ``scrub_bytes_per_s`` is None for what suits the engine."""

    capacity_bytes: int
    drain_s: float
    log_level: str
    scrub_bytes_per_s: int | None

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> LiveSettings:
        """Of the settings of the command.

        Raises:
            ConfigurationError: a value that is none.
        """
        capacity_bytes = parse_bytes(arguments.capacity)
        if capacity_bytes < 1:
            raise ConfigurationError("--capacity must be at least 1 byte")
        if not arguments.drain_s >= 0:
            raise ConfigurationError("--drain-s must be at least 0")
        rate = arguments.scrub_rate
        return cls(capacity_bytes, arguments.drain_s, arguments.log_level, None if rate is None else parse_bytes(rate))

    def scrub_bytes_per_s_of(self, engine: StorageEngine) -> int:
        """The rate at which ``engine`` is scrubbed."""
        if self.scrub_bytes_per_s is not None:
            return self.scrub_bytes_per_s
        return 0 if engine.waits_for_network else _SCRUB_BYTES_PER_S


class Reloader:
    """Reads the settings of a running peer anew and applies those of :data:`LIVE`. Thread-safe."""

    def __init__(
        self, read: Callable[[], Resolved], arguments: argparse.Namespace, engine: StorageEngine, scrubber: Scrubber
    ) -> None:
        """Starts from what the peer was started with."""
        self._read = read
        self._lock = threading.Lock()
        self._values = vars(arguments)
        self._engine = engine
        self._scrubber = scrubber
        self.live = LiveSettings.parse(arguments)
        """What is in force."""

    def reload(self) -> None:
        """Applies what has changed and logs it. What can't be read or is no value changes nothing. Raises nothing."""
        with self._lock:
            try:
                resolved = self._read()
                self._apply(resolved, LiveSettings.parse(resolved.namespace()))
            except KVCodecError as error:
                logger.error("the settings were not taken anew: %s", error)
            except Exception:
                # A thread's top: whatever it is, the peer goes on as it is.
                logger.exception("the settings were not taken anew")

    def _apply(self, resolved: Resolved, live: LiveSettings) -> None:
        fields = {name.replace("-", "_") for name in LIVE}
        changed = [field for field, value in resolved.values.items() if value != self._values.get(field)]
        if live.capacity_bytes != self.live.capacity_bytes:
            self._engine.resize(live.capacity_bytes)
        if live.scrub_bytes_per_s != self.live.scrub_bytes_per_s:
            self._scrubber.set_rate(live.scrub_bytes_per_s_of(self._engine))
        logs.set_level(live.log_level)
        self.live = live
        for field in changed:
            name = field.replace("_", "-")
            if field not in fields:
                logger.warning("%s has changed: that takes a start of the peer", name)
                continue
            logger.info("%s is %s now, and was %s", name, resolved.values[field], self._values[field])
            self._values[field] = resolved.values[field]
        if not changed:
            logger.info("the settings were read again: nothing has changed")
