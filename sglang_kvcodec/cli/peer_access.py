"""Flags of every command that talks to a peer: how it knows the peer, and what it shows it."""

from __future__ import annotations

import argparse
import os

from sglang_kvcodec.config import Access


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them; without a flag the variable that servers read counts, ``KVCODEC_TLS_CA`` and the like."""
    group = parser.add_argument_group("access to the peer")
    for name, words in (
        ("tls-ca", "who signs the certificate of a grpcs:// peer; the system's CAs without"),
        ("tls-cert", "this client's own certificate, for a peer that asks for one"),
        ("tls-key", "its private key"),
        ("token-file", "file that holds a token, for a peer that asks for one"),
    ):
        default = os.environ.get(_variable(name), "")
        group.add_argument(f"--{name}", metavar="FILE", default=default, help=f"{words} ({_variable(name)})")
    group.add_argument("--insecure", action="store_true", help="send the token in plaintext to another machine")


def access(arguments: argparse.Namespace) -> Access:
    """What the parsed flags say."""
    return Access(
        tls_ca=arguments.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        token_file=arguments.token_file,
        insecure=arguments.insecure,
    )


def _variable(name: str) -> str:
    return "KVCODEC_" + name.upper().replace("-", "_")
