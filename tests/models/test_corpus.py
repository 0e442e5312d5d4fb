import pathlib

import numpy as np
import pytest
from tiny_lm import corpus
from tiny_lm.corpus import Document
from tokenizers import Tokenizer

TOKENIZER = pathlib.Path(__file__).parent / "tiny-code-lm/tokenizer.json"
SENTENCES = (
    "A page is a run of consecutive tokens, and its hash names all the tokens before it as well. Two requests that\n"
    "begin with the same words share their first pages, and what was computed for one need not be computed again.\n"
)


def test_nothing_is_both_trained_on_and_held_out():
    names = [name.lower() for name in (*corpus.TRAINING, *corpus.HELD_OUT)]
    assert len(names) == len(set(names))
    assert set(corpus.ORIGINAL) <= set(corpus.TRAINING)


@pytest.mark.parametrize("name", [*corpus.TRAINING, *corpus.HELD_OUT])
def test_every_source_is_permissively_licensed(name):
    assert corpus.describe(name).licence


def test_a_licence_that_is_not_permissive_is_refused():
    with pytest.raises(ValueError, match=r"hypothesis is not known to be permissively licensed: 'MPL-2\.0'"):
        corpus.describe("hypothesis")


def test_prose_is_sentences_without_code_and_tables():
    text = "\n\n".join([SENTENCES, ">>> f(x)[3] = {'a': 1}", "x | 1 | 2\n--+---+--\ny | 3 | 4", SENTENCES.lower()])
    assert corpus.prose_of(text) == SENTENCES.strip() + "\n\n" + SENTENCES.strip().lower() + "\n"
    assert corpus.prose_of("Too short to be kept as a document of its own, though it is a sentence.") == ""


def test_a_held_out_file_that_copies_trained_text_is_dropped():
    lines = [f"this_is_a_long_enough_line_of_code({number})" for number in range(20)]
    trained = Document("sympy", "a.py", False, "\n".join(lines[:3]))
    copied = Document("jedi", "b.py", False, "\n".join(lines))
    own = Document("jedi", "c.py", False, "\n".join(lines[2:] + ["x = 1"] * 50))
    assert corpus.without_copies([copied, own], [trained]) == [own]


def test_a_package_is_read_within_its_bound_and_the_same_each_time():
    documents = corpus.read(["iniconfig", "packaging"], 30_011, 5_003)
    assert documents == corpus.read(["iniconfig", "packaging"], 30_011, 5_003)
    for name in ("iniconfig", "packaging"):
        for prose, bound in ((False, 30_011), (True, 5_003)):
            sizes = [len(d.text.encode()) for d in documents if d.source == name and d.prose == prose]
            assert 400 <= sum(sizes) <= bound
    assert not [d for d in documents if "_vendor" in d.path]


def test_marks_in_a_text_do_not_become_marks():
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    (ids,) = corpus.tokens([Document("jedi", "a.py", False, 'END = "<|im_end|>"<|endoftext|>')], tokenizer)
    assert ids.dtype == np.uint16
    assert ids[0] == 0
    assert not set(ids[1:].tolist()) & {0, 1, 2}
