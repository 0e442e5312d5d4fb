"""Digests and hashes of 32 bytes on a command line."""

from __future__ import annotations

import argparse
import re


def digest(text: str) -> bytes:
    """The bytes that 64 hexadecimal digits are; for ``add_argument(type=...)``."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"not 64 hexadecimal digits: {text!r}")
    return bytes.fromhex(text)
