"""``kvcodec bench gantt``: a picture of one request of a server's trace."""

from __future__ import annotations

import argparse
import pathlib

from sglang_kvcodec.cli.output import check_picture, prepare_out
from sglang_kvcodec.evaluation.tables import check_can_draw
from sglang_kvcodec.latency.gantt import draw, gantt_of
from sglang_kvcodec.latency.trace_file import read_trace


def add_parser(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``gantt`` to ``bench``."""
    parser = benches.add_parser(
        "gantt",
        help="a picture of one request of a trace",
        description="Draws when a request was queued, fetched, decoded, restored and computed. The trace may still be "
        "written, or its server may have been killed.",
    )
    parser.add_argument("trace", metavar="TRACE.json", type=pathlib.Path, help="of an SGLang server's --kvcodec-trace")
    parser.add_argument("--request", metavar="RID", help="which request (default: the last one that fetched)")
    parser.add_argument("--out", metavar="FILE", type=pathlib.Path, required=True, help="the picture, .svg or .png")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Draws; 0 when done.

    Raises:
        KVCodecError: there is nothing to draw, or no place for it.
    """
    check_can_draw(otherwise="")
    check_picture(arguments.out)
    prepare_out(arguments.out.parent)
    trace = read_trace(arguments.trace)
    gantt = gantt_of(trace, arguments.request or trace.newest())
    draw(arguments.out, gantt)
    if trace.unreadable_lines:
        print(f"{trace.unreadable_lines} lines of {arguments.trace} can't be read and were left out")
    print(f"request {gantt.rid}, of {len(trace.requests)} in the trace: written to {arguments.out}")
    return 0
