"""``kvcodec doctor``: what this machine has, how fast it is, and whether kvcodec pays here.

The examination is imported when it runs, so that the command works where there is no PyAV.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sglang_kvcodec.cli.peer_access import access, add_access_arguments
from sglang_kvcodec.config import DECODERS, ENCODERS
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.testing.machine import describe_machine, versions


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``doctor`` to the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has, how fast it is, and whether kvcodec pays",
        description="Looks at SGLang, the video engines and the codecs, measures for a few seconds, and says when "
        "fetching beats computing. Exit status 0 if a server would start, 1 with the reasons if not.",
    )
    parser.add_argument("--remote", metavar="URL", help="peers to measure the links to; objects are put and deleted")
    add_access_arguments(parser)
    parser.add_argument("--model", metavar="PATH", type=pathlib.Path, help="a model's directory or config.json")
    parser.add_argument("--prefill-tokens-per-s", metavar="RATE", type=float, help="of the server without kvcodec")
    parser.add_argument("--bits-per-value", metavar="BITS", type=float, default=2.0, help="coded; 2 is 8x below bf16")
    parser.add_argument("--page-size", metavar="TOKENS", type=int, default=64)
    parser.add_argument("--tp-size", metavar="N", type=int, default=1, help="rates are then those of one rank")
    parser.add_argument("--device", metavar="N", type=int, default=0, help="CUDA device to look at, where there is one")
    parser.add_argument("--decoder", choices=DECODERS, default="auto", help="as --kvcodec-decoder of the server")
    parser.add_argument("--encoder", choices=ENCODERS, default="auto", help="as --kvcodec-encoder of the server")
    parser.add_argument("--decode-threads", metavar="N", type=int, default=2)
    parser.add_argument("--encoder-processes", metavar="N", type=int, default=1)
    parser.add_argument("--seconds", metavar="S", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examines and prints; 0 if a server would start, else 1.

    Raises:
        ConfigurationError: an argument makes no sense.
    """
    for name in ("page_size", "tp_size", "decode_threads"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1")
    if not (0 < arguments.bits_per_value <= 8 and arguments.seconds >= 0 and arguments.encoder_processes >= 0):
        raise ConfigurationError("--bits-per-value must be above 0 and at most 8, and no number below 0")
    if arguments.prefill_tokens_per_s is not None and not arguments.prefill_tokens_per_s > 0:
        raise ConfigurationError("--prefill-tokens-per-s must be above 0")
    try:
        from sglang_kvcodec.evaluation.examination import examine
    except ImportError as error:
        raise ConfigurationError(f"the doctor needs PyAV and NumPy: {error}") from error
    findings = {"machine": describe_machine(), "versions": versions()} | examine(arguments, access(arguments))
    print(json.dumps(findings, indent=1) if arguments.json else as_text(findings))
    return 1 if findings["reasons"] else 0


def as_text(findings: Mapping[str, Any]) -> str:
    """The findings for people."""
    machine, engines, pictures = findings["machine"], findings["video_engines"], findings["pictures"]
    lines = [
        f"kvcodec {findings['kvcodec']} on {machine['cores']} cores of {machine['cpu']}",
        f"GPUs       {', '.join(machine['gpus']) or 'none that nvidia-smi shows'}",
        f"SGLang     {findings['sglang']['version'] or 'none'}: {findings['sglang']['guard']}",
        f"NVDEC      {engines['decode_problem'] or str(engines['decode_engines']) + ' engines of ' + engines['gpu']}",
        f"NVENC      {engines['encode_problem'] or str(engines['encode_engines']) + ' engines of ' + engines['gpu']}",
    ]
    lines += [
        f"{status['direction']:10} {status['name']:9}{'yes' if status['available'] else 'no':4} {status['reason']}"
        for status in findings["backends"]
    ]
    lines.append(f"pictures   {pictures['width']} x {pictures['height']}, {pictures['per_segment']} a call")
    for direction in ("encode", "decode"):
        if direction in findings:
            rate = findings[direction]
            lines.append(
                f"{direction:10} {rate['backend']}: {rate['samples_per_s'] / 1e6:.1f} MB/s of samples,"
                f" {rate['coded_bits_per_s'] / 1e6:.1f} Mbit/s coded, {rate['pictures_per_s']:.0f} pictures/s"
                f" at {rate['bits_per_sample']:.2f} bits, {rate['workers']} at once"
            )
    if "restore" in findings:
        lines.append(
            f"restore    {findings['restore']['values_per_s_per_thread'] / 1e6:.1f} M values/s on a thread of the host"
        )
    lines += [
        f"link       {link['round_trip_s'] * 1e3:.2f} ms, fetch {link['fetch_bits_per_s'] / 1e9:.3f} Gbit/s,"
        f" put {link['put_bits_per_s'] / 1e9:.3f} Gbit/s; {link['remote']} {link['peer']}"
        for link in findings.get("links", ())
    ]
    if "break_even" in findings:
        even = findings["break_even"]
        lines.append(
            f"break-even {even['values_per_token']} values a token; coded beats raw below"
            f" {even['codec_beats_raw_below_bits_per_s'] / 1e9:.3f} Gbit/s"
        )
        if even["fetch_tokens_per_s"] is not None:
            lines.append(f"           {even['fetch_tokens_per_s']:.0f} tokens/s, bound by {even['bound_by']}")
        lines.append(
            f"           fetching beats computing from {even['min_tokens']} tokens on"
            if even["min_tokens"] is not None
            else f"           when fetching beats computing: {even['why_no_min_tokens']}"
        )
    lines += [f"note       {note}" for note in findings["notes"]]
    lines += [f"REFUSED    {reason}" for reason in findings["reasons"]]
    lines.append("a server would start" if findings["would_start"] else "a server would not start")
    return "\n".join(lines)
