"""The results for people: the targets with what was measured, then every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_text(document: Mapping[str, Any]) -> str:
    """The whole result; every line of a rehearsal is marked as one."""
    parts: Mapping[str, list[dict[str, Any]]] = document["parts"]
    lines = [f"{name:58} {measured:24} {target}" for name, measured, target in summary(parts)]
    lines.append("")
    for part, rows in parts.items():
        lines += [f"{part}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()) for row in rows]
    mark = "REHEARSAL ON A CPU  " if document["is_rehearsal"] else ""
    return "\n".join(mark + line for line in lines)


def summary(parts: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """What was asked for, what was measured, and the target; ``not measured`` where there is nothing."""

    def value(part: str, key: str, **wanted: object) -> Any:
        for row in parts.get(part, []):
            if key in row and all(row.get(name) == want for name, want in wanted.items()):
                return row[key]
        return None

    exact = [row["is_exact"] for row in parts.get("exactness", []) if row.get("stream") == "ours"]
    rates = [row for row in parts.get("decode_rates", []) if "coded_gbit_per_s" in row]
    cabac = max((row["coded_gbit_per_s"] for row in rates), default=None)
    lines = [
        ("our streams decode bit for bit", f"{sum(exact)} of {len(exact)}" if exact else None, "all"),
        ("restore, identity: share of copy bandwidth", value("restore_identity", "share_of_copy_bandwidth"), ">= 0.8"),
        ("  ceiling: copy, GB/s", value("ceilings", "copy_gb_per_s"), ""),
    ]
    for blocks, target in ((1, "< 3 ms"), (3, "< 6 ms")):
        ms = value("restore_klt", "all_layers_ms", by="kernel", layers_per_basis=blocks)
        lines.append((f"restore, KLT over {blocks} layers: ms for all layers", ms, target))
    lines += [
        ("  ceiling: products in bf16, TFLOP/s", value("ceilings", "matmul_tflop_per_s"), ""),
        ("NVDEC: most coded Gbit/s (CABAC)", cabac, "named"),
        (
            "NVDEC: most tokens/s at 120 Ki values, any bits per sample",
            max((row["tokens_per_s_at_120_ki_values"] for row in rates), default=None),
            "against bits",
        ),
        (
            "pipeline through the host: tokens/s at 120 Ki values",
            value("pipeline", "tokens_per_s_at_120_ki_values"),
            ">= 33000",
        ),
        ("slow-down of products beside it", value("interference", "slow_down"), "< 0.03, < 0.08"),
        ("first picture of a warm pool, ms", value("latency", "first_picture_ms", decoder="warm"), "< 10"),
        ("GPU memory of the decoders, MiB", _mebibytes(value("latency", "used_bytes")), "< 1024"),
    ]
    return [(name, "not measured" if found is None else _short(found), target) for name, found, target in lines]


def _mebibytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / (1 << 20)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
