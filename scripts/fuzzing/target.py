"""What a parser is fuzzed as: a function of bytes, and bytes to begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


class FindingError(AssertionError):
    """A parser took what it should have refused, or gave what it should not."""


def require(condition: bool, words: str) -> None:
    """Raises ``FindingError`` unless ``condition``; not an ``assert``, which ``-O`` takes away."""
    if not condition:
        raise FindingError(words)


@dataclasses.dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: on the command line.
        about: a line for people.
        check: reads bytes; whether they were accepted. Raises whatever is a finding: ``FindingError``, or any other
            error than the typed refusal that the parser promises.
        seeds: inputs to begin with, the accepted ones among them.
        words: what inputs are made of, beside what the seeds have.
    """

    name: str
    about: str
    check: Callable[[bytes], bool]
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[bytes, ...] = ()
