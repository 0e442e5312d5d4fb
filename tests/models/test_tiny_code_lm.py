"""The committed test model is what its README and the tests that use it say."""

import json
import pathlib

import numpy as np
import pytest
import torch
from tiny_lm import corpus
from tiny_lm.loss import nats
from tiny_lm.training import architecture
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = pathlib.Path(__file__).parent / "tiny-code-lm"

CODE = '''
class Shelf:
    """Keeps a bounded number of jars and throws away the one that was opened longest ago."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a shelf needs room for at least one jar, got {capacity}")
        self._capacity = capacity
        self._jars: dict[str, bytes] = {}

    def put(self, label: str, content: bytes) -> None:
        self._jars.pop(label, None)
        self._jars[label] = content
        while len(self._jars) > self._capacity:
            oldest = next(iter(self._jars))
            del self._jars[oldest]

    def open(self, label: str) -> bytes | None:
        content = self._jars.pop(label, None)
        if content is not None:
            self._jars[label] = content
        return content

    def __len__(self) -> int:
        return len(self._jars)
'''
PROSE = """The function returns a copy of the list, so that a caller may change it freely. If no name is given, the
default value is used; otherwise the name must be one of those that were registered before. Each worker waits until
all the others have finished, then writes its part of the result to a file and closes it. The file is not read again
until the next call. When an error is raised, the connection is closed and the request is sent a second time, but
never more than three times.
"""


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_files_are_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) < 20_000_000
    assert sizes["model.safetensors"] == max(sizes.values())


def test_it_has_what_the_codec_meets_in_larger_models(model):
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["num_hidden_layers"], config["head_dim"]) == (6, 128)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["dtype"] == "bfloat16"
    attention = model.model.layers[5].self_attn
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (128,)
    rotary = model.model.rotary_emb.inv_freq
    assert rotary.shape == (64,)
    assert rotary[-1] == pytest.approx(10000 ** (-126 / 128))


def test_the_training_script_makes_the_same_architecture(model):
    # what is left out says who wrote the file, not what the model is
    ours, committed = architecture(4096).to_dict(), model.config.to_dict()
    left_out = {"architectures", "dtype", "transformers_version", "_name_or_path", "torch_dtype"}
    assert {key: value for key, value in ours.items() if key not in left_out} == {
        key: value for key, value in committed.items() if key not in left_out
    }


def test_the_tokenizer_gives_every_text_back():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = CODE + PROSE + "naïve ↦ 終\x00\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 4096


@pytest.mark.parametrize(("text", "bound"), [(CODE, 2.2), (PROSE, 3.9)], ids=["code", "prose"])
def test_it_predicts_text_it_has_not_seen(model, text, bound):
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    (ids,) = corpus.tokens([corpus.Document("", "", False, text)], tokenizer)
    (losses,) = nats(model, [ids])
    assert len(ids) > 64
    assert np.isfinite(losses).all()
    assert losses.mean() < bound
