"""Text to chat about: Python source from the standard library, which is there on every machine."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Sequence

_MODULES = ("unittest.mock", "typing", "pydoc", "inspect", "argparse", "tarfile", "zipfile", "_pydecimal", "doctest")


def source_slices(sizes_chars: Sequence[int], *modules: str) -> list[str]:
    """Consecutive slices of the source of ``modules``, of some large ones by default.

    Each module begins at its first definition: after a licence text a small model writes licence texts.

    Raises:
        ValueError: the modules are shorter than the slices together.
    """
    text = "\n".join(definitions_of(name) for name in modules or _MODULES)
    if sum(sizes_chars) > len(text):
        raise ValueError(f"there are {len(text)} characters of text, not {sum(sizes_chars)}")
    slices, start = [], 0
    for size in sizes_chars:
        slices.append(text[start : start + size])
        start += size
    return slices


def definitions_of(module: str) -> str:
    """The source of a module from its first definition on.

    Raises:
        ValueError: it has none.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {module} has no source")
    text = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    first = re.search(r"^(?:class|def) ", text, re.MULTILINE)
    return text[first.start() :] if first else text


def first_difference(left: str, right: str) -> str:
    """Where two texts part, with what stands around it on both sides; empty if they are equal."""
    if left == right:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    start = max(0, at - 30)
    return f"at character {at}: {left[start : at + 30]!r} against {right[start : at + 30]!r}"
