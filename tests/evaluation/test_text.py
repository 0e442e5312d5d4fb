"""Texts and prompts: what ships, how it is cut, what is hidden where."""

import itertools

import pytest
import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation.text import (
    KINDS,
    Text,
    cut_documents,
    make_conversations,
    make_needles,
    read_texts,
    shipped_texts,
)


def by_byte(text):
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def as_text(tokens):
    return bytes(tokens.tolist()).decode(errors="replace")


def test_texts_of_all_kinds_ship_in_halves_without_a_common_line():
    halves = {split: shipped_texts(split) for split in ("calibration", "evaluation")}
    for texts in halves.values():
        assert {text.kind for text in texts[:4]} == set(KINDS)
        assert len({(text.kind, text.name) for text in texts}) == len(texts) >= 12
        assert all(len(text.content) > 2000 for text in texts)
    lines = {
        split: {line.strip() for text in texts for line in text.content.splitlines() if len(line.strip()) > 60}
        for split, texts in halves.items()
    }
    assert not lines["calibration"] & lines["evaluation"]
    assert [text.kind for text in shipped_texts("evaluation", ["prose"])] == ["prose"] * 3
    with pytest.raises(ValueError, match="no texts"):
        shipped_texts("training")


def test_documents_take_every_text_in_turn():
    texts = [Text("a", "file", "a" * 25), Text("b", "file", "b" * 9), Text("c", "file", "c" * 31)]
    documents = cut_documents(texts, by_byte, 10, 5)
    assert [document.name for document in documents] == ["a", "c", "a#1", "c#1", "c#2"]
    assert all(len(document.tokens) == 10 for document in documents)
    with pytest.raises(ConfigurationError, match="give 5 passages of 10 tokens, not 6"):
        cut_documents(texts, by_byte, 10, 6)


def test_needles_lie_deeper_and_deeper_and_prefixes_are_full():
    text = Text("prose", "prose", "".join(f"line {number} of the hay\n" for number in range(200)))
    code = Text("code", "code", text.content)
    needles = make_needles([text, code], by_byte, 1500, 7)
    depths = []
    for index, needle in enumerate(needles):
        assert len(needle.prefix) == 1500
        hidden, asked, answer = (
            as_text(tokens) for tokens in (needle.prefix, needle.question.question, needle.question.answer)
        )
        sentence = asked.strip().removeprefix("assert ") + answer
        told = sentence.replace("==", "=") if index % 2 else sentence
        assert hidden.count(told) == 1
        # it stands on lines of its own
        assert hidden[hidden.index(told) - 1] == "\n"
        depths.append(hidden.index(told))
    assert depths == sorted(depths)
    assert all(later - earlier > 100 for earlier, later in itertools.pairwise(depths))
    assert len({as_text(needle.question.answer) for needle in needles}) == 7
    with pytest.raises(ConfigurationError, match="too short"):
        make_needles([Text("short", "prose", "word\n")], by_byte, 100, 1)


def test_conversations_tell_each_fact_once_and_ask_for_all():
    talk = [Text("talk", "chat", "User: hm\nAssistant: hm\n\n" * 200)]
    first, second = make_conversations(talk, by_byte, 1200, 2)
    assert 1100 < sum(map(len, first.turns)) <= 1200
    said = as_text(torch.cat(first.turns))
    for question in first.questions:
        fact = as_text(question.question).rsplit("Assistant: Your", 1)[1] + as_text(question.answer)
        assert said.count(f"User: My{fact}.") == 1
    names = [[as_text(question.answer) for question in c.questions] for c in (first, second)]
    assert sorted(names[0]) == sorted(names[1])
    assert names[0] != names[1]
    with pytest.raises(ConfigurationError, match="too short"):
        make_conversations(talk, by_byte, 200, 1)
    with pytest.raises(ConfigurationError, match="too short"):
        make_conversations(talk, by_byte, 1200, 9)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "good.txt").write_text("Grüße\n", encoding="utf-8")
    assert read_texts([tmp_path / "good.txt"]) == [Text("good.txt", "file", "Grüße\n")]
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8 text: byte 3"):
        read_texts([tmp_path / "bad.txt"])
    with pytest.raises(ConfigurationError, match="can't read"):
        read_texts([tmp_path / "none.txt"])
