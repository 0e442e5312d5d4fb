"""Texts to measure with: those that ship with the package, the operator's own, and prompts that ask for recall."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import torch

from sglang_kvcodec.errors import ConfigurationError

KINDS = ("code", "prose", "chat", "languages")
"""What kinds of text ship."""
SPLITS = ("calibration", "evaluation")
"""Halves of them without a common passage."""

Encode = Callable[[str], torch.Tensor]
"""Text to int64 ``(tokens,)``."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and where it is from; ``kind`` is one of ``KINDS``, or ``"file"`` for the operator's own."""

    name: str
    kind: str
    content: str


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens of a passage, int64 ``(tokens,)``."""

    name: str
    kind: str
    tokens: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked after a prefix: tokens of the question, up to the answer, and those of the answer."""

    question: torch.Tensor
    answer: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Needle:
    """A passage with one sentence that does not belong there, and the question for it.

    Attributes:
        name: where the sentence stands in which text.
        prefix: int64 ``(tokens,)``.
        question: asks for the sentence.
    """

    name: str
    prefix: torch.Tensor
    question: Question


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation in which facts are told one after another, and the questions for them.

    Attributes:
        name: which it is.
        turns: int64 ``(tokens,)`` each.
        questions: asked after the last turn, each on its own.
    """

    name: str
    turns: tuple[torch.Tensor, ...]
    questions: tuple[Question, ...]


def shipped_texts(split: str, kinds: Sequence[str] = KINDS) -> list[Text]:
    """The texts that ship with the package, one of each kind in turn, so that the first few are of all kinds.

    Args:
        split: ``"calibration"`` or ``"evaluation"``.
        kinds: which kinds.
    """
    root = importlib.resources.files(__package__) / "texts"
    by_kind = []
    for kind in kinds:
        if kind not in KINDS or split not in SPLITS:
            raise ValueError(f"no texts {kind}/{split} ship; there are {KINDS} of {SPLITS}")
        files = sorted((root / kind / split).iterdir(), key=lambda file: file.name)
        by_kind.append([Text(f.name.removesuffix(".txt"), kind, f.read_text(encoding="utf-8")) for f in files])
    rounds = itertools.zip_longest(*by_kind)
    return [text for texts in rounds for text in texts if text is not None]


def read_texts(paths: Sequence[pathlib.Path]) -> list[Text]:
    """The operator's own texts.

    Raises:
        ConfigurationError: not a file with UTF-8 text.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Text(path.name, "file", path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigurationError(f"can't read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is not UTF-8 text: byte {error.start}") from error
    return texts


def cut_documents(texts: Sequence[Text], encode: Encode, tokens: int, count: int) -> list[Document]:
    """Documents of equal length: the first passage of every text in turn, then the second, and so on.

    Args:
        texts: to cut.
        encode: the model's tokenizer.
        tokens: of each document.
        count: how many.

    Raises:
        ConfigurationError: the texts are too short for that.
    """
    passages: list[Iterator[Document]] = [_passages(text, encode, tokens) for text in texts]
    documents = [document for row in itertools.zip_longest(*passages) for document in row if document is not None]
    if len(documents) < count:
        raise ConfigurationError(
            f"the texts give {len(documents)} passages of {tokens} tokens, not {count}: "
            "ask for fewer or shorter ones, or give more text"
        )
    return documents[:count]


def _passages(text: Text, encode: Encode, tokens: int) -> Iterator[Document]:
    encoded = encode(text.content)
    for number in range(len(encoded) // tokens):
        name = f"{text.name}#{number}" if number else text.name
        yield Document(name, text.kind, encoded[number * tokens : (number + 1) * tokens])


_PLACES = ("lighthouse", "bakery", "museum", "harbour", "library", "theatre", "airport", "castle")
_WORDS = ("orange", "silver", "monday", "garden", "window", "copper", "summer", "bridge")


def make_needles(texts: Sequence[Text], encode: Encode, tokens: int, count: int) -> list[Needle]:
    """Prompts that hide a sentence at depths spread over the whole prefix.

    Args:
        texts: to hide it in, one after another.
        encode: the model's tokenizer.
        tokens: of each prefix.
        count: how many prompts.

    Raises:
        ConfigurationError: the texts are too short for that.
    """
    needles = []
    for index in range(count):
        text = texts[index % len(texts)]
        place, word = _PLACES[index % len(_PLACES)], _WORDS[(3 * index + index // len(_WORDS)) % len(_WORDS)]
        if text.kind == "code":
            told, asked = f'{place.upper()}_PASSWORD = "{word}"', f'assert {place.upper()}_PASSWORD == "'
        else:
            told, asked = f"The password of the {place} is {word}.", f"The password of the {place} is"
        prefix = _hide(encode(f"\n{told}\n\n"), text, encode, tokens, (index + 0.5) / count)
        answer = encode(word if text.kind == "code" else f" {word}")
        needles.append(Needle(f"{text.name}#{index}", prefix, Question(encode(f"\n\n{asked}"), answer)))
    return needles


def _hide(sentence: torch.Tensor, text: Text, encode: Encode, tokens: int, depth: float) -> torch.Tensor:
    """``tokens`` tokens of ``text`` with ``sentence`` after the line that ends nearest to ``depth`` of them."""
    lines = [encode(line) for line in text.content.splitlines(keepends=True)]
    room = tokens - len(sentence)
    if room < 1 or sum(map(len, lines)) < room:
        raise ConfigurationError(
            f"{text.name} is too short for a prefix of {tokens} tokens with a sentence hidden in it"
        )
    ends = list(itertools.accumulate(map(len, lines)))
    before = min((end for end in [0, *ends] if end <= room), key=lambda end: abs(end - depth * room))
    haystack = torch.cat(lines)
    return torch.cat([haystack[:before], sentence, haystack[before:room]])


_NAMED = ("sister", "dog", "teacher", "neighbour", "boat", "doctor")
_NAMES = ("Laura", "Max", "Robert", "Peter", "Victoria", "Martin")


def make_conversations(texts: Sequence[Text], encode: Encode, tokens: int, count: int) -> list[Conversation]:
    """Conversations in which the user names something in each turn, with other talk in between.

    Args:
        texts: to take the talk in between from.
        encode: the model's tokenizer.
        tokens: of each conversation, at most.
        count: how many.

    Raises:
        ConfigurationError: the texts or ``tokens`` are too short for that.
    """
    talk = torch.cat([encode(text.content) for text in texts])
    conversations = []
    for number in range(count):
        facts = [(thing, _NAMES[(index + number) % len(_NAMES)]) for index, thing in enumerate(_NAMED)]
        told = [
            encode(f"\n\nUser: My {thing} is called {name}.\nAssistant: Your {thing} is called {name}.\n\n")
            for thing, name in facts
        ]
        filling_tokens = tokens // len(facts) - max(map(len, told))
        if filling_tokens < 1 or len(talk) < (number + 1) * tokens:
            raise ConfigurationError(f"the texts or the prefix are too short for {count} conversations")
        starts = [number * tokens + index * filling_tokens for index in range(len(facts))]
        conversations.append(
            Conversation(
                f"conversation-{number}",
                tuple(torch.cat([fact, talk[at : at + filling_tokens]]) for fact, at in zip(told, starts, strict=True)),
                tuple(
                    Question(
                        encode(f"\n\nUser: What is my {thing} called?\nAssistant: Your {thing} is called"),
                        encode(f" {name}"),
                    )
                    for thing, name in facts
                ),
            )
        )
    return conversations
