"""``kvcodec token``: makes a token for a client of a peer."""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import sys
import time

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.tokens import SCOPES, TokenEntry, append_entry, new_token, require_name

_SECONDS = {"m": 60, "h": 3600, "d": 86400}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``token`` to the command."""
    parser = subparsers.add_parser(
        "token",
        help="make a token for a client of a peer",
        description="Makes a token and adds its SHA-256 to the file that `kvcodec serve --tokens` reads. The token "
        "itself is printed once, to be kept in the client's --token-file, and is nowhere else. To withdraw it, remove "
        "its entry from the file.",
    )
    parser.add_argument("name", metavar="NAME", help="of the client, in logs and limits")
    parser.add_argument("--tokens", metavar="FILE", type=pathlib.Path, required=True, help="made if it is not there")
    parser.add_argument(
        "--scopes", default="read,write", help=f"some of {','.join(SCOPES)}, with commas (default: %(default)s)"
    )
    parser.add_argument("--tenant", default="", help="whose pages and calibrations it sees; the default tenant without")
    parser.add_argument("--expires-in", metavar="TIME", help="such as 12h or 90d (default: never)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Makes a token; the token alone on stdout, so that it can go into a file, and what was added on stderr.

    Raises:
        ConfigurationError: a bad name, scope or time, or the file can't be written.
    """
    require_name(arguments.name, "the name of a token")
    if arguments.tenant:
        require_name(arguments.tenant, "the name of a tenant")
    scopes = frozenset(arguments.scopes.split(","))
    if not scopes <= set(SCOPES):
        raise ConfigurationError(f"scopes are some of {', '.join(SCOPES)}, not {arguments.scopes!r}")
    token = new_token()
    digest = hashlib.sha256(token.encode()).digest()
    entry = TokenEntry(arguments.name, digest, scopes, arguments.tenant, _expires_at_s(arguments.expires_in))
    print(f"added to {arguments.tokens}:\n{append_entry(arguments.tokens, entry)}", file=sys.stderr)
    print(token)
    return 0


def _expires_at_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if match is None or not int(match[1]):
        raise ConfigurationError(f"not a time: {text!r}; write e.g. 12h or 90d")
    return time.time() + int(match[1]) * _SECONDS[match[2]]
