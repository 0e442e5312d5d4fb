"""One request of a trace as rows of bars, and as a picture."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from sglang_kvcodec.evaluation.tables import check_can_draw
from sglang_kvcodec.latency.picture import READABLE_SVG
from sglang_kvcodec.latency.trace_file import Span, Trace

_OF_REQUEST = {
    "queued": ("lookup queue", "fetch queue"),
    "lookup": ("lookup",),
    "wire": ("wire",),
    "held": ("held",),
}
_OF_THREADS: dict[str, Callable[[str], bool]] = {
    "decode": lambda name: name == "decode",
    "restore": lambda name: name == "restore",
    "wait for layer": lambda name: name.startswith("wait for layer"),
}
_RESTORING = ("decode", "restore")
_MARKS = ("plan", "promise", "switch")
"""Spans without a length: drawn as lines."""
_WHOLE = "first token"
_LABELLED_SHARE = 0.035
"""A bar shorter than this share of the request has no room for a word."""
_COLOURS = {
    "queued": "tab:gray",
    "lookup": "tab:cyan",
    "wire": "tab:blue",
    "held": "lightgray",
    "decode": "tab:orange",
    "restore": "tab:green",
    "wait for layer": "tab:red",
    "forward": "tab:purple",
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """From ``start_s`` to ``end_s``, in seconds since the request was queued."""

    start_s: float
    end_s: float
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """Bars of one kind, in lanes: those of one lane don't overlap."""

    name: str
    lanes: tuple[tuple[Bar, ...], ...]

    @property
    def busy_s(self) -> float:
        """The sum of its bars."""
        return sum(bar.end_s - bar.start_s for lane in self.lanes for bar in lane)


@dataclasses.dataclass(frozen=True)
class Gantt:
    """A request from being queued to its first token.

    Attributes:
        rid: what its server calls it.
        duration_s: until its first token, or until the last that is known of it.
        rows: those that have bars, from top to bottom.
        marks: moments, and what happened.
        plan: what was planned and why, in the server's words; empty where nothing was.
        is_shared: others were restored meanwhile, and work of threads may be theirs.
    """

    rid: str
    duration_s: float
    rows: tuple[Row, ...]
    marks: tuple[Bar, ...]
    plan: str
    is_shared: bool


def gantt_of(trace: Trace, rid: str) -> Gantt:
    """The rows of one request.

    Raises:
        NotFoundError: there is no such request.
    """
    spans = trace.spans_of(rid)
    start_s = min(span.start_s for span in spans)
    whole = [span for span in spans if span.name == _WHOLE]
    end_s = whole[-1].end_s if whole else max(span.end_s for span in spans)
    rows = [_row(name, [span for span in spans if span.name in names], start_s) for name, names in _OF_REQUEST.items()]
    work = _work_of(trace, spans)
    rows += [
        _row(name, [span for span in work if is_it(span.name)], start_s, _work_label)
        for name, is_it in _OF_THREADS.items()
    ]
    if not rows[-2].lanes:
        # On a GPU restoring is queued behind decoding, and only its whole is known.
        rows[-2] = _row("restore", [span for span in spans if span.name == "restore"], start_s)
    rows.append(_row("forward", [span for span in spans if span.name == "forward"], start_s, _forward_label))
    known = {*(name for names in _OF_REQUEST.values() for name in names), *_MARKS, _WHOLE, "restore", "forward"}
    others = dict.fromkeys(span.name for span in spans if span.name not in known)
    rows += [_row(name, [span for span in spans if span.name == name], start_s) for name in others]
    return Gantt(
        rid,
        end_s - start_s,
        tuple(row for row in rows if row.lanes),
        tuple(Bar(span.start_s - start_s, span.end_s - start_s, span.name) for span in spans if span.name in _MARKS),
        next((_plan_words(span) for span in spans if span.name == "plan"), ""),
        _is_shared(trace, rid, spans),
    )


def _work_of(trace: Trace, spans: Sequence[Span]) -> list[Span]:
    """What threads did while the request was restored, and how its pass waited: their events don't say for whom."""
    restores = [span for span in spans if span.name == "restore"]
    if not restores:
        return []
    start_s, restored_s = min(span.start_s for span in restores), max(span.end_s for span in restores)
    computed_s = max(span.end_s for span in spans if span.name in ("restore", "forward"))
    return [
        work
        for work in trace.work
        if work.end_s > start_s and work.start_s < (restored_s if work.name in _RESTORING else computed_s)
    ]


def _is_shared(trace: Trace, rid: str, spans: Sequence[Span]) -> bool:
    own = [span for span in spans if span.name == "restore"]
    return any(
        other.name == "restore" and other.start_s < mine.end_s and mine.start_s < other.end_s
        for mine in own
        for other_rid, others in trace.requests.items()
        if other_rid != rid
        for other in others
    )


def _row(name: str, spans: Sequence[Span], start_s: float, label: Callable[[Span], str] = lambda span: "") -> Row:
    """Puts each bar into the first lane that is free."""
    lanes: list[list[Bar]] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        bar = Bar(span.start_s - start_s, span.end_s - start_s, label(span))
        lane = next((lane for lane in lanes if lane[-1].end_s <= bar.start_s), None)
        if lane is None:
            lanes.append([bar])
        else:
            lane.append(bar)
    return Row(name, tuple(map(tuple, lanes)))


def _work_label(span: Span) -> str:
    if span.name.startswith("wait for layer"):
        return span.name.removeprefix("wait for layer").strip()
    side = str(span.args.get("side", ""))[:1]
    return f"{span.args.get('group', '')}{side}"


def _forward_label(span: Span) -> str:
    tokens = span.args.get("new_tokens")
    return "" if tokens is None else f"{tokens} tokens"


def _plan_words(span: Span) -> str:
    return " ".join(str(span.args[name]) for name in ("reason", "tier") if span.args.get(name))


def draw(path: pathlib.Path, gantt: Gantt) -> None:
    """Draws it.

    Args:
        path: of the picture; its suffix says of what type, ``.svg`` or ``.png``.
        gantt: of a request.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    check_can_draw(otherwise="")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(READABLE_SVG):
        figure = Figure(figsize=(10, 1.6 + 0.45 * max(2, len(gantt.rows))), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(gantt.rows):
            colour = _COLOURS.get(row.name, "tab:olive")
            height = 0.8 / len(row.lanes)
            for number, lane in enumerate(row.lanes):
                bottom = place - 0.4 + number * height
                axes.broken_barh(
                    [(bar.start_s, bar.end_s - bar.start_s) for bar in lane],
                    (bottom, height * 0.94),
                    facecolor=colour,
                    edgecolor="white",
                    linewidth=0.4,
                )
                for bar in lane:
                    if bar.label and bar.end_s - bar.start_s > _LABELLED_SHARE * gantt.duration_s:
                        middle = ((bar.start_s + bar.end_s) / 2, bottom + height * 0.47)
                        axes.text(*middle, bar.label, ha="center", va="center", fontsize=6, color="white")
        for mark in gantt.marks:
            axes.axvline(mark.start_s, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(
                mark.label, (mark.start_s, 1), xycoords=("data", "axes fraction"), rotation=45, fontsize=7, va="bottom"
            )
        axes.axvline(gantt.duration_s, color="black", linewidth=1)
        axes.set_yticks(
            range(len(gantt.rows)), [f"{row.name}, {_seconds(row.busy_s)}" for row in gantt.rows], fontsize=8
        )
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the request was queued")
        axes.grid(axis="x", alpha=0.2)
        axes.set_title(_title(gantt), fontsize=9, pad=24 if gantt.marks else 6)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _title(gantt: Gantt) -> str:
    words = f"request {gantt.rid}: first token after {_seconds(gantt.duration_s)}"
    if gantt.plan:
        words += f", plan: {gantt.plan}"
    if gantt.is_shared:
        words += "\ndecode, restore and waits are those of all requests that were restored meanwhile"
    return words
