"""What a measurement leaves behind: JSON, CSV, and two pictures."""

from __future__ import annotations

import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvcodec.evaluation.tables import write_csv
from sglang_kvcodec.latency import gantt, picture
from sglang_kvcodec.latency.rows import Found, flat
from sglang_kvcodec.latency.samples import Sample
from sglang_kvcodec.latency.trace_file import read_trace
from sglang_kvcodec.testing.machine import describe_machine, versions


def document(
    found: Found, samples: Sequence[Sample], serving: Sequence[Mapping[str, Any]], configuration: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    return {
        "benchmark": "ttft",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": describe_machine(),
        "versions": versions(),
        "configuration": dict(configuration),
        "planner_over_best": found.planner_over_best(),
        "broken_words": found.broken_words(),
        "rows": found.rows(),
        "serving": [dict(row) for row in serving],
        "samples": [_sample_json(sample) for sample in samples],
    }


def _sample_json(sample: Sample) -> dict[str, Any]:
    reply = sample.reply
    return {
        "method": sample.method,
        "bandwidth": sample.bandwidth,
        "repeat": sample.repeat,
        "ttft_s": round(reply.ttft_s, 4),
        "prompt_tokens": reply.prompt_tokens,
        "cached_storage_tokens": reply.cached.storage,
        "fetched_bytes": sample.fetched_bytes,
        "reasons": list(sample.reasons),
        "rid": reply.rid,
        "text": reply.text,
    }


def write(out: pathlib.Path, result: Mapping[str, Any], with_picture: bool) -> list[pathlib.Path]:
    """Writes ``ttft.json``, ``ttft.csv`` with all that belongs to a row in each, and ``ttft.svg``.

    Returns:
        The files.
    """
    path = out / "ttft.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    common = flat({name: result[name] for name in ("date", "configuration", "machine", "versions")})
    write_csv(out / "ttft.csv", [{**row, **common} for row in result["rows"]])
    files = [path, out / "ttft.csv"]
    if with_picture:
        files.append(out / "ttft.svg")
        configuration = result["configuration"]
        prompt_tokens = result["rows"][0]["prompt_tokens_median"]
        title = f"{configuration['model']}, {configuration['load']}, prompts of {prompt_tokens:.0f} tokens"
        picture.draw(files[-1], title, result["rows"])
    return files


def draw_request(out: pathlib.Path, trace_path: pathlib.Path, rid: str) -> pathlib.Path:
    """Draws one request of a trace as ``gantt.svg``.

    Raises:
        KVCodecError: the trace can't be read, or the request is not in it.
    """
    gantt.draw(out / "gantt.svg", gantt.gantt_of(read_trace(trace_path), rid))
    return out / "gantt.svg"
