"""Where benchmarks show how far they are, and where they write."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from sglang_kvcodec.errors import ConfigurationError


class ProgressBar:
    """A progress bar with an estimate of the time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, steps: int) -> None:
        """See ``Progress.begin``."""
        from tqdm import tqdm

        self._bar = tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True)

    def step(self, words: str) -> None:
        """See ``Progress.step``."""
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update()

    def say(self, words: str) -> None:
        """A line above the bar."""
        from tqdm import tqdm

        tqdm.write(words, file=sys.stderr)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()


def prepare_out(out: pathlib.Path | None) -> pathlib.Path | None:
    """The directory for results, there and writable, before anything is measured for it.

    Raises:
        ConfigurationError: it can't be written to.
    """
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
        except OSError as error:
            raise ConfigurationError(f"can't write to {out}: {error.strerror}") from error
    return out


def check_picture(path: pathlib.Path) -> None:
    """Refuses a picture of another type than can be drawn.

    Raises:
        ConfigurationError: neither ``.svg`` nor ``.png``.
    """
    if path.suffix not in (".svg", ".png"):
        raise ConfigurationError(f"{path}: a picture is .svg or .png")
