"""Rows of figures as CSV and as a table in the terminal; what a benchmark without torch needs too."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvcodec.errors import ConfigurationError

Row = Mapping[str, Any]


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Rows under the union of their columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table for the terminal.

    Args:
        rows: summaries.
        columns: key of a row -> heading; what no row has is left out.
    """
    shown = {key: heading for key, heading in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [list(shown.values()), *([_cell(row.get(key)) for key in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)


def check_can_draw(otherwise: str = ", or use --no-picture") -> None:
    """Refuses where there is no matplotlib, before anything was measured for a picture.

    Args:
        otherwise: what else an operator may do, to end the sentence with.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f'the picture needs the package matplotlib: pip install "sglang-kvcodec[bench]"{otherwise}'
        ) from error
