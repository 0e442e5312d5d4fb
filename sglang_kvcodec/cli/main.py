"""The ``kvcodec`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sglang_kvcodec import __version__
from sglang_kvcodec.cli import admin, bench, calibrate, calibrations, doctor, serve, token
from sglang_kvcodec.errors import KVCodecError

_SUBCOMMANDS = (serve, token, admin, doctor, calibrate, calibrations, bench)
"""Modules with ``add_parser(subparsers)``; it sets ``run``, a function of the parsed arguments to the exit status."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(prog="kvcodec", description="A remote KV cache for SGLang, carried as video.")
    parser.add_argument("--version", action="version", version=f"kvcodec {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; what is wrong with the request is one sentence on stderr and exit status 2."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except KVCodecError as error:
        print(f"kvcodec: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has had enough. What is left of it must not fail again when Python flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
