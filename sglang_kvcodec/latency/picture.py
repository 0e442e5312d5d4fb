"""TTFT against bandwidth as a picture, a line for each method."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvcodec.evaluation.tables import check_can_draw
from sglang_kvcodec.latency.samples import DEVICE, PLANNER, PLANNER_FIRST, PREFILL

READABLE_SVG = {"svg.fonttype": "none", "svg.hashsalt": "kvcodec"}
"""Words stay words, and the same figures give the same file."""
_BEYOND = 10.0
"""How far right of the fastest bandwidth the one without a bound stands."""
_STYLES: dict[str, dict[str, Any]] = {
    PREFILL: {"linestyle": "--", "color": "tab:gray"},
    DEVICE: {"linestyle": ":", "color": "tab:gray"},
    PLANNER: {"linewidth": 2.5, "color": "black", "zorder": 5},
    PLANNER_FIRST: {"linestyle": "--", "color": "black"},
}


def draw(path: pathlib.Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws rows of :meth:`Found.rows`, both axes logarithmic; the planner lies on top.

    Args:
        path: of the picture; its suffix says of what type, ``.svg`` or ``.png``.
        title: above it.
        rows: medians in seconds, with 10th and 90th percentiles as a band.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    check_can_draw()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    places = _places(rows)
    with matplotlib.rc_context(READABLE_SVG):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for method in dict.fromkeys(row["method"] for row in rows):
            of_it = [row for row in rows if row["method"] == method]
            x = [places[row["bandwidth"]] for row in of_it]
            style: dict[str, Any] = {"linewidth": 1.2, **_STYLES.get(method, {})}
            (line,) = axes.plot(x, [row["ttft_s_median"] for row in of_it], marker="o", markersize=4, **style)
            line.set_label(method.replace("_", ", "))
            low, high = ([row[f"ttft_s_{end}"] for row in of_it] for end in ("p10", "p90"))
            axes.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xticks(list(places.values()), list(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bandwidth of the peer")
        axes.set_ylabel("time to first token, s (median, 10th to 90th percentile)")
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _places(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bandwidth -> where it stands, from left to right."""
    bounded = {row["bandwidth"]: float(row["bits_per_s"]) for row in rows if row["bits_per_s"]}
    places = dict(sorted(bounded.items(), key=lambda pair: pair[1]))
    beyond = max(places.values(), default=1.0) * _BEYOND
    return {**places, **{row["bandwidth"]: beyond for row in rows if not row["bits_per_s"]}}
