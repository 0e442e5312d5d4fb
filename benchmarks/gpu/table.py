"""The results for people: the targets with what was measured, then every row."""

from __future__ import annotations

import functools
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
    lines: list[tuple[str, Any, str]] = [
        ("our streams decode bit for bit", f"{sum(exact)} of {len(exact)}" if exact else None, "all"),
        ("restore, identity: share of copy bandwidth", value("restore_identity", "share_of_copy_bandwidth"), ">= 0.8"),
        ("  ceiling: copy, GB/s", value("ceilings", "copy_gb_per_s"), ""),
    ]
    for layers, target in ((1, "< 3 ms"), (3, "< 6 ms")):
        kernel = functools.partial(value, "restore_klt", by="kernel", layers_per_basis=layers)
        name = f"restore, KLT over {layers}: "
        lines += [
            (name + "ms of the device for all layers", kernel("device_ms"), target),
            ("  and with the host's preparation, nothing else under way", kernel("all_layers_ms"), ""),
            (name + "share of the tighter bound", kernel("share_of_bound"), ">= 0.5"),
            (f"  ceiling: {kernel('bound') or 'bound'}, ms", kernel("bound_ms"), ""),
        ]
    lines += [
        ("  ceiling: products in bf16, TFLOP/s", value("ceilings", "matmul_tflop_per_s"), ""),
        (
            "pack, high, KLT over 3: ms for all layers",
            value("pack", "all_layers_ms", by="kernel", layers_per_basis=3),
            "",
        ),
        ("digest: share of copy bandwidth", value("digest", "share_of_copy_bandwidth"), ""),
    ]
    for pictures in dict.fromkeys(row["pictures"] for row in rates if row["pictures"] != "noise"):
        of_these = [row for row in rates if row["pictures"] == pictures]
        best = max(of_these, key=lambda row: row["samples_mb_per_s"])
        name = f"NVDEC, {pictures}: {best['bits_per_sample']:.3g} bits/sample, "
        lines.append((name + "MB/s of samples", best["samples_mb_per_s"], f"at {best['decoders']} decoders"))
        lines.append((name + "tokens/s", best["tokens_per_s_at_120_ki_values"], ""))
    lines.append(
        ("  ceiling: CABAC, Gbit/s coded", max((row["coded_gbit_per_s"] for row in rates), default=None), "named")
    )
    for tier, layers in (("high", 1), ("high", 3), ("balanced", 1), ("balanced", 3)):
        run = functools.partial(value, "pipeline", tier=tier, layers_per_basis=layers)
        name = f"pipeline, {tier}, basis over {layers}: "
        lines += [
            (name + "tokens/s at 120 Ki values", run("tokens_per_s_at_120_ki_values"), ">= 33000"),
            ("  ceiling: the same decoders alone", run("decode_alone_tokens_per_s"), ""),
            ("  ceiling: digest and restore alone", run("kernels_alone_tokens_per_s"), ""),
            ("  limit", run("limit"), "named"),
        ]
    for loop in ("matrix products", "decode steps"):
        lines += [
            (
                f"slow-down of {loop}, basis over {layers}",
                value("interference", "slow_down", loop=loop, layers_per_basis=layers),
                target,
            )
            for layers, target in ((1, "< 0.03"), (3, "< 0.08"))
        ]
    lines += [
        ("first picture of a warm pool, ms", value("latency", "first_picture_ms", decoder="warm"), "< 10"),
        (
            "  beside matrix products, ms",
            value("latency", "first_picture_ms", decoder="warm, beside products"),
            "",
        ),
        ("GPU memory of the decoders, MiB", _mebibytes(value("latency", "used_bytes")), "< 1024"),
        ("  and of restore buffers, at most (an estimate), MiB", _mebibytes(value("latency", "restore_bytes")), ""),
    ]
    return [(name, "not measured" if found is None else _short(found), target) for name, found, target in lines]


def _mebibytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / (1 << 20)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
