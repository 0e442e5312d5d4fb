"""Texts of a length in tokens, none twice: source of the standard library, which is there on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_kvcodec.testing.conversation import definitions_of

_MODULES = (
    *("argparse", "inspect", "tarfile", "zipfile", "typing", "_pydecimal", "turtle", "doctest", "pydoc", "subprocess"),
    *("pickletools", "mailbox", "logging", "smtplib", "ssl", "optparse", "ftplib", "statistics", "pickle", "enum"),
    *("pathlib", "socket", "threading", "platform", "ipaddress", "http.client", "email.message", "unittest.mock"),
    *("difflib", "datetime", "imaplib", "dataclasses", "shutil", "locale", "configparser", "plistlib", "heapq"),
)
_FIRST_CHARS_PER_TOKEN = 4.0


def fresh_texts(count_tokens: Callable[[str], int], tokens: int) -> Iterator[str]:
    """Texts of about ``tokens`` tokens, none twice.

    Args:
        count_tokens: what a model's tokenizer makes of a text.
        tokens: wanted of each; one has a few per cent more or less.

    Raises:
        RuntimeError: no text is left.
    """
    source = "\n".join(definitions_of(module) for module in _MODULES)
    start, chars_per_token = 0, _FIRST_CHARS_PER_TOKEN
    while True:
        # The second look corrects what the text before had by the way of characters a token.
        for _ in range(2):
            text = source[start : start + max(1, round(tokens * chars_per_token))]
            chars_per_token = len(text) / max(1, count_tokens(text))
        text = source[start : start + max(1, round(tokens * chars_per_token))]
        start += len(text)
        if start >= len(source):
            raise RuntimeError(f"no text of {tokens} tokens is left: ask for fewer repeats, or shorter prefixes")
        yield text
