"""One parser under atheris, in a process of its own, which libFuzzer ends: ``python -m fuzzing.coverage_guided``.

Arguments: the target, then libFuzzer's. Seeds are written into the first corpus directory if that is empty.
"""

from __future__ import annotations

import importlib
import logging
import pathlib
import sys
import time

import atheris

from fuzzing.target import require

INPUT_LIMIT_S = 5.0
"""Of CPU time: inputs are of a few KiB."""


def main() -> None:
    """Runs until libFuzzer has enough, or a finding."""
    name, *arguments = sys.argv[1:]
    # What is compared inside is looked at too, so these have to be imported here first.
    from fuzzing.parsers import MODULES_OF

    with atheris.instrument_imports(include=list(MODULES_OF[name]), enable_loader_override=False):
        for module in MODULES_OF[name]:
            importlib.import_module(module)
        from fuzzing.parsers import load

        target = load(name)
    logging.disable(logging.CRITICAL)
    corpus = pathlib.Path(next(each for each in arguments if not each.startswith("-")))
    if not any(corpus.iterdir()):
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)

    if target.words:
        dictionary = corpus.with_suffix(".words")
        dictionary.write_text(
            "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words)
        )
        arguments.append(f"-dict={dictionary}")

    def one_input(data: bytes) -> None:
        started_s = time.process_time()
        target.check(data)
        require(time.process_time() - started_s < INPUT_LIMIT_S, "an input that takes too long")

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
