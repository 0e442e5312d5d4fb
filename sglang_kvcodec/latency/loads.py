"""What servers are asked: prompts whose first part is stored at the peer, and whose end is new."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from sglang_kvcodec.testing.sglang_client import Message, SGLangClient

LOADS = ("shared-prefix", "multi-turn")


@dataclasses.dataclass(frozen=True)
class Load:
    """How prompts are made.

    Attributes:
        kind: ``"shared-prefix"``: a long text, and other questions about it; ``"multi-turn"``: a conversation that
            goes on at a server which has not seen it.
        prefix_tokens: of the long text, or of all that the user has said before, about.
        turns: of a conversation, the measured one included.
        answer_tokens: at most, of each answer.
    """

    kind: str
    prefix_tokens: int
    turns: int = 4
    answer_tokens: int = 8

    @property
    def text_tokens(self) -> int:
        """About how long each fresh text is."""
        return max(1, self.prefix_tokens // (1 if self.kind == "shared-prefix" else self.turns - 1))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prefix, and the questions that follow it.

    Attributes:
        stored: the conversation that is computed and published beforehand.
        asked: number of a question -> the conversation that is measured.
    """

    stored: tuple[Message, ...]
    asked: Callable[[int], tuple[Message, ...]]


def make_prompt(load: Load, texts: Iterator[str], baseline: SGLangClient) -> Prompt:
    """A prompt of fresh texts; the answers inside a conversation are those of ``baseline``.

    Raises:
        OSError: it does not answer.
        RuntimeError: no text is left.
    """
    if load.kind == "shared-prefix":
        text = next(texts)
        return Prompt((_user(f"{text}\n\n{_question(0)}"),), lambda number: (_user(f"{text}\n\n{_question(number)}"),))
    history: list[Message] = []
    for turn in range(1, load.turns):
        history.append(_user(next(texts)))
        if turn < load.turns - 1:
            history.append(_answered(baseline, history, load))
    answered = (*history, _answered(baseline, history, load))
    return Prompt(tuple(history), lambda number: (*answered, _user(_question(number))))


def _answered(baseline: SGLangClient, history: list[Message], load: Load) -> Message:
    return {"role": "assistant", "content": baseline.chat(history, load.answer_tokens).text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _question(number: int) -> str:
    """A short one. The number comes first, so that no two have a page in common."""
    return f"{number}: which names are defined above?"
