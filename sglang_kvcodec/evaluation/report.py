"""What a run found, as JSON and as one picture: divergence against ratio."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from sglang_kvcodec.evaluation.harness import MethodReport, Size
from sglang_kvcodec.evaluation.tables import Row, check_can_draw
from sglang_kvcodec.format.profile import CALIBRATED_TIERS


def write_json(path: pathlib.Path, settings: Row, reports: Sequence[MethodReport]) -> None:
    """Everything: settings, a summary of each method, its bits by layer, and its figures by document."""
    document = {
        "settings": dict(settings),
        "methods": [_method_json(report) for report in reports],
        "equal_divergence": equal_divergence([report.summary() for report in reports]),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _method_json(report: MethodReport) -> dict[str, Any]:
    sides = list(report.sizes[0].bits)
    return {
        **report.summary(),
        "layer_bits": {side.value: report.layer_bits(side) for side in sides},
        "layer_ideal_bits": {side.value: report.layer_bits(side, ideal=True) for side in sides},
        "documents": [{**_size_json(size), **_accuracy_json(report, index)} for index, size in enumerate(report.sizes)],
    }


def _size_json(size: Size) -> dict[str, Any]:
    return {
        "document": size.document,
        "raw_bytes": size.raw_bytes,
        "coded_bytes": size.coded_bytes,
        "metadata_bytes": size.metadata_bytes,
    }


def _accuracy_json(report: MethodReport, index: int) -> dict[str, Any]:
    if not report.accuracies:
        return {}
    accuracy = report.accuracies[index]
    return {
        "kl_nats": accuracy.divergence.kl_nats,
        "loss_nats": accuracy.divergence.loss_nats,
        "untouched_loss_nats": report.reference_losses[index],
        "top1_agreement": accuracy.divergence.top1_agreement,
        "greedy_agreement_tokens": accuracy.greedy_agreement_tokens,
    }


def layer_rows(reports: Sequence[MethodReport]) -> list[dict[str, Any]]:
    """One row for each method, side and layer: its bits per value, and the ideal coder's."""
    rows = []
    for report in reports:
        for side in report.sizes[0].bits:
            bits, ideal = report.layer_bits(side) or [], report.layer_bits(side, ideal=True)
            rows += [
                {
                    "method": report.method,
                    "side": side.value,
                    "layer": layer,
                    "bits_per_value": figure,
                    "ideal_bits_per_value": ideal[layer] if ideal else None,
                }
                for layer, figure in enumerate(bits)
            ]
    return rows


_TIERS = "calibrated tiers"
_YARDSTICKS = ("fp8", "kivi@4")
"""Methods whose divergence others are compared at."""


def equal_divergence(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """What others would have for a ratio at the divergence of FP8 and of 4-bit groups.

    Only for methods that were measured with several parameters, which make a curve, and only within it: between two
    of its points both logarithms are interpolated.

    Returns:
        Yardstick -> family of methods -> ratio to bf16.
    """
    known = {row["method"]: row for row in rows if row.get("kl_nats")}
    return {
        yardstick: {
            family: ratio
            for family, points in _curves(list(known.values())).items()
            if (ratio := _interpolate(points, known[yardstick]["kl_nats"])) is not None
        }
        for yardstick in _YARDSTICKS
        if yardstick in known
    }


def _family_of(row: Row) -> str:
    """Methods that differ in a parameter only are one curve, and so are the calibrated tiers."""
    name = str(row["method"]).partition("@")[0]
    return _TIERS if name in CALIBRATED_TIERS else name


def _curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Divergence and ratio of the members of each family, by rising divergence."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        family = _family_of(row)
        curves.setdefault(family, []).append((row["kl_nats"], row["ratio_to_bf16"]))
    return {family: sorted(points) for family, points in curves.items() if len(points) > 1}


def _interpolate(points: Sequence[tuple[float, float]], kl_nats: float) -> float | None:
    for (low_kl, low), (high_kl, high) in itertools.pairwise(points):
        if low_kl <= kl_nats <= high_kl:
            span = math.log(high_kl / low_kl)
            share = math.log(kl_nats / low_kl) / span if span else 0.0
            return float(low ** (1 - share) * high**share)
    return None


_MARKERS = "osD^vP*X<>hd"
_COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:gray",
    "tab:olive",
    "tab:cyan",
    "black",
    "gold",
    "navy",
)
_RATIO_TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def draw(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Divergence against ratio, both logarithmic. Methods that differ by their parameter are one line.

    A method without divergence is drawn at the lower edge, as logarithms have no zero.

    Args:
        path: of the picture; its suffix says of what type, ``.svg`` or ``.png``.
        title: above it.
        rows: summaries, as ``MethodReport.summary`` gives and the JSON holds them.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter

    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(_family_of(row), []).append(row)
    positive = [row["kl_nats"] for row in rows if row["kl_nats"] > 0]
    floor = min(positive, default=1e-6) / 5
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=_COLOURS)
    for index, (family, members) in enumerate(families.items()):
        members = sorted(members, key=lambda row: row["ratio_to_bf16"])
        ratios = [row["ratio_to_bf16"] for row in members]
        kls = [max(row["kl_nats"], floor) for row in members]
        axes.plot(ratios, kls, marker=_MARKERS[index % len(_MARKERS)], linestyle="-", label=family)
    for row in rows:
        _, _, parameter = str(row["method"]).partition("@")
        if parameter:
            axes.annotate(
                parameter,
                (row["ratio_to_bf16"], max(row["kl_nats"], floor)),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("times smaller than bf16, all metadata counted")
    axes.set_ylabel("KL divergence of next-token distributions, nats")
    axes.axhline(floor, color="grey", linewidth=0.5, linestyle=":")
    axes.annotate("no divergence", (1, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    axes.grid(which="both", alpha=0.2)
    axes.xaxis.set_major_locator(FixedLocator(_RATIO_TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
    figure.savefig(path)
