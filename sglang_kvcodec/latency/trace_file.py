"""Reads what ``--kvcodec-trace`` wrote: the requests of a server and the work of its threads.

The file may end anywhere, as its server may still run or may have been killed. Events of names that this does not know
are kept; what can't be read is left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from sglang_kvcodec.errors import FormatError, NotFoundError

EXPLORATIONS = "explorations"
"""The id of fetches that no request waits for."""
_SHOWN_RIDS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Something that took from ``start_s`` to ``end_s``, in seconds of the server's monotonic clock."""

    name: str
    start_s: float
    end_s: float
    args: Mapping[str, Any]

    @property
    def duration_s(self) -> float:
        """How long."""
        return self.end_s - self.start_s


@dataclasses.dataclass
class Trace:
    """What a trace file holds.

    Attributes:
        requests: id -> its spans, in the order of the file; those without an end are left out.
        work: of the server's threads, whichever request it was for.
        unreadable_lines: that were left out, beside a last one that is cut off.
    """

    requests: dict[str, list[Span]] = dataclasses.field(default_factory=dict)
    work: list[Span] = dataclasses.field(default_factory=list)
    unreadable_lines: int = 0

    def newest(self) -> str:
        """The last request that fetched something and came to its first token; or one that came to it; or any.

        Raises:
            NotFoundError: there is no request.
        """
        chosen, chosen_rank = "", -1
        for rid, spans in self.requests.items():
            names = {span.name for span in spans}
            rank = 2 * ("first token" in names) + ("wire" in names)
            if rank >= chosen_rank:
                chosen, chosen_rank = rid, rank
        if not chosen:
            raise NotFoundError("the trace holds no request: its server has not been asked yet")
        return chosen

    def spans_of(self, rid: str) -> list[Span]:
        """The spans of a request.

        Raises:
            NotFoundError: there is no such request; with the newest ones that there are.
        """
        if rid not in self.requests:
            some = ", ".join(list(self.requests)[-_SHOWN_RIDS:])
            raise NotFoundError(f"the trace has no request {rid!r}; its newest are: {some or 'none'}")
        return self.requests[rid]


def read_trace(path: pathlib.Path) -> Trace:
    """Reads a trace.

    Raises:
        NotFoundError: there is no such file, or it can't be read.
        FormatError: it is no trace of kvcodec.
    """
    trace = Trace()
    begun: dict[tuple[str, str], list[dict[str, Any]]] = {}
    is_ours = False
    try:
        for event in _events(path, trace):
            try:
                is_ours |= _add(event, trace, begun)
            except (KeyError, TypeError, ValueError):
                trace.unreadable_lines += 1
    except OSError as error:
        raise NotFoundError(f"can't read {path}: {error.strerror}") from error
    if not is_ours:
        raise FormatError(f"{path} is no trace of kvcodec: write one with --kvcodec-trace")
    return trace


def _add(event: dict[str, Any], trace: Trace, begun: dict[tuple[str, str], list[dict[str, Any]]]) -> bool:
    """Adds an event; whether it is one that kvcodec writes."""
    kind = event["ph"]
    if kind in ("b", "e") and event["cat"] == "request":
        rid, name = str(event["id"]), str(event["name"])
        if kind == "b":
            begun.setdefault((rid, name), []).append(event)
        elif begin := begun.get((rid, name)):
            first = begin.pop(0)
            span = Span(name, float(first["ts"]) / 1e6, float(event["ts"]) / 1e6, dict(first.get("args") or {}))
            if rid != EXPLORATIONS:
                trace.requests.setdefault(rid, []).append(span)
        return True
    if kind == "X" and event["cat"] == "work":
        start_s = float(event["ts"]) / 1e6
        duration_s = float(event["dur"]) / 1e6
        trace.work.append(Span(str(event["name"]), start_s, start_s + duration_s, dict(event.get("args") or {})))
        return True
    return kind == "M" and event["name"] == "process_name" and "kvcodec" in str(event["args"]["name"])


def _events(path: pathlib.Path, trace: Trace) -> Iterator[dict[str, Any]]:
    """The events of a file that has one on each line, as kvcodec writes it; of another one by reading it whole."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
        if first.strip() == "[":
            cut_off = False
            for line in file:
                # A line that can't be read is cut off if it is the last one.
                trace.unreadable_lines += cut_off
                cut_off = False
                text = line.strip().rstrip(",")
                if text in ("", "]"):
                    continue
                try:
                    event = json.loads(text)
                except ValueError:
                    cut_off = True
                    continue
                if isinstance(event, dict):
                    yield event
            return
        try:
            document = json.loads(first + file.read())
        except ValueError:
            raise FormatError(f"{path} is no trace: it is not JSON") from None
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise FormatError(f"{path} is no trace: it has no list of events")
    yield from (event for event in events if isinstance(event, dict))
