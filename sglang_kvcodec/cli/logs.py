"""How a peer writes its log: a line for people, or a JSON object a line for programs."""

from __future__ import annotations

import datetime
import json
import logging

FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """A JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, ``exception`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See the base class."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, form: str) -> None:
    """Has every logger of the process write to stderr from ``level`` on, in one of :data:`FORMATS`."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def set_level(level: str) -> None:
    """Changes the level from now on."""
    logging.getLogger().setLevel(level.upper())
