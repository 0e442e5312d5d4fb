"""Prompts to which a model's words do not hang on rounding: only of these can the words be compared.

What else is in a batch, where the passes over a prompt end and how its layers are shared out change the order in which
products are summed up, with any cache, and so the word where two are as likely. The logits are bfloat16: two that are
as likely differ by nothing or by one unit in the last place, 1/16 for those of the models used here.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator

from sglang_kvcodec.testing.sglang_client import SGLangClient

CLEAR_MARGIN = 0.25
"""Each word of a clear answer is likelier than the next best by at least this difference of log-probabilities: four
units in the last place. Of 192 answers to any prompts a server without kvcodec gave 14 others in another batch, all of
them to prompts with a margin of 1/16 at most; of 112 to clear ones none."""


def clear_texts(
    client: SGLangClient, texts: Iterable[str], max_tokens: int, at_once: int = 1
) -> Iterator[tuple[str, str]]:
    """Those of ``texts`` to which the answer is clear, each with it.

    Args:
        client: of a server without kvcodec.
        texts: questions, each asked once.
        max_tokens: of an answer.
        at_once: how many are asked at the same time, and taken from ``texts`` ahead of what is yielded.
    """

    def decided(text: str) -> tuple[str, float]:
        return client.decided([{"role": "user", "content": text}], max_tokens)

    rest = iter(texts)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while batch := list(itertools.islice(rest, at_once)):
            for text, (answer, margin) in zip(batch, pool.map(decided, batch), strict=True):
                if margin >= CLEAR_MARGIN:
                    yield text, answer
