"""``kvcodec admin``: what lies on running storage peers, and what an operator does with it."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

from sglang_kvcodec.cli import admin_change, admin_look
from sglang_kvcodec.cli.admin_peers import AdminPeer, connected
from sglang_kvcodec.cli.digest_argument import digest
from sglang_kvcodec.cli.peer_access import access, add_access_arguments
from sglang_kvcodec.config import ServerConfig


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``admin`` to the command."""
    parser = subparsers.add_parser(
        "admin",
        help="look at running peers, remove, check, move pages",
        description="Looks at the pages of running storage peers, removes, checks and moves them.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    stat = _add_command(commands, "stat", admin_look.stat, "show what a peer holds")
    stat.add_argument("--by-namespace", action="store_true", help="also by namespace: the peer walks over all its keys")
    stat.add_argument("--json", action="store_true", help="print a JSON object for each peer, one a line")

    ls = _add_command(commands, "ls", admin_look.ls, "list the namespaces of a peer, or the pages of one")
    _add_namespace(ls, "list its pages", is_optional=True)
    ls.add_argument("--json", action="store_true", help="print a JSON object for each namespace or page, one a line")

    rm = _add_command(commands, "rm", admin_change.rm, "delete a namespace, or pages of it")
    _add_namespace(rm, "whose pages")
    rm.add_argument("pages", metavar="PAGE", type=digest, nargs="*", help="which pages, by their hashes; without: all")
    rm.add_argument("--yes", action="store_true", help="do not ask")

    verify = _add_command(commands, "verify", admin_look.verify, "read every object and check it; 1 if one is damaged")
    _add_namespace(verify, "check only its pages", is_optional=True)

    warm = _add_command(commands, "warm", admin_look.warm, "have a peer read its pages, so that caches have them")
    _add_namespace(warm, "read only its pages", is_optional=True)

    export = _add_command(commands, "export", admin_change.export, "write pages to a file")
    export.add_argument("file", metavar="FILE", type=pathlib.Path, help="file to write")
    _add_namespace(export, "write only its pages", is_optional=True)
    export.add_argument("--force", action="store_true", help="overwrite FILE")

    import_ = _add_command(commands, "import", admin_change.import_, "store the pages of an exported file")
    import_.add_argument("file", metavar="FILE", type=pathlib.Path, help="file to read")
    import_.add_argument(
        "--replicas",
        metavar="N",
        type=_replicas,
        default=ServerConfig.replicas,
        help="of several peers, on how many each page is kept: as the servers have it",
    )


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, Sequence[AdminPeer]], int],
    words: str,
) -> argparse.ArgumentParser:
    def connect_and_run(arguments: argparse.Namespace) -> int:
        with connected(arguments.remote, access(arguments)) as peers:
            return run(arguments, peers)

    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.add_argument(
        "--remote", metavar="URL", required=True, help="the peers, grpc://HOST:PORT[,HOST:PORT...]; grpcs: TLS"
    )
    add_access_arguments(parser)
    parser.set_defaults(run=connect_and_run)
    return parser


def _add_namespace(parser: argparse.ArgumentParser, words: str, *, is_optional: bool = False) -> None:
    parser.add_argument(
        "namespace",
        metavar="NAMESPACE",
        type=digest,
        nargs="?" if is_optional else None,
        help=f"{words} (64 hexadecimal digits)",
    )


def _replicas(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"not a number above 0: {text!r}")
    return int(text)
