"""The model runner: KV out of a model, back in, and the gradients of what the model says with respect to it."""

import json
import pathlib

import gguf
import pytest
import torch
import transformers

from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.models import CausalLM

TINY = pathlib.Path(__file__).parent / "tiny-code-lm"
TEXT = "def greatest_common_divisor(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\n\nclass Stack:\n"


@pytest.fixture(scope="module")
def model():
    return CausalLM.load(TINY)


@pytest.fixture(scope="module")
def tokens(model):
    tokens = model.encode(TEXT * 3)
    assert len(tokens) >= 101
    return tokens[:101]


def head(kv, count):
    return {side: tensor[:, :count] for side, tensor in kv.items()}


def make_model(directory, config):
    """A decoder with random weights on disk, with the tokenizer of the tiny model."""
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


def test_the_spec_is_that_of_the_servers_pool(model):
    assert model.kv_spec(64) == KVSpec(6, 2, 128, 64, KVDtype.BFLOAT16)
    assert model.config["rope_parameters"]["rope_theta"] == 10000.0
    assert model.config["model_type"] == "qwen3"


def test_text_survives_the_tokenizer(model):
    assert model.decode(model.encode(TEXT)) == TEXT
    assert model.encode("x").dtype == torch.int64


def test_kv_is_that_of_transformers_itself(model, tokens):
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        layers = reference(tokens[None], use_cache=True).past_key_values.layers
    kv = model.prefill(tokens)
    assert kv.keys() == {Side.KEY, Side.VALUE}
    for layer in (0, 5):
        for side, expected in ((Side.KEY, layers[layer].keys), (Side.VALUE, layers[layer].values)):
            assert kv[side].shape == (6, 101, 2, 128)
            assert kv[side].dtype == torch.bfloat16
            torch.testing.assert_close(kv[side][layer], expected[0].transpose(0, 1).bfloat16())


def test_a_prefix_and_its_continuation_give_what_the_whole_gives():
    exact = CausalLM.load(TINY, dtype=torch.float32)
    tokens = exact.encode(TEXT * 2)[:61]
    whole = exact.continue_from(head(exact.prefill(tokens), 0), tokens[:0], tokens)
    kv = exact.prefill(tokens)
    for cut in (1, 37, 60):
        before = kv[Side.KEY].clone()
        logits = exact.continue_from(head(kv, cut), tokens[:cut], tokens[cut:])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, whole[cut:], rtol=1e-4, atol=1e-4)
        assert torch.equal(kv[Side.KEY], before)


def test_a_prompt_can_be_computed_in_pieces():
    exact = CausalLM.load(TINY, dtype=torch.float32)
    tokens = exact.encode(TEXT * 2)[:61]
    whole = exact.prefill(tokens)
    for cut in (1, 37, 60):
        rest = exact.prefill(tokens, head(whole, cut))
        for side in whole:
            torch.testing.assert_close(rest[side], whole[side][:, cut:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="leaves nothing"):
        exact.prefill(tokens, whole)


def test_the_prefix_kv_is_really_used(model, tokens):
    kv = model.prefill(tokens[:64])
    untouched = model.continue_from(kv, tokens[:64], tokens[64:])
    for side in kv:
        disturbed = {**kv, side: kv[side] * 1.5}
        logits = model.continue_from(disturbed, tokens[:64], tokens[64:])
        assert (logits - untouched).abs().max() > 0.1


def test_greedy_words_are_those_of_transformers(model, tokens):
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    expected = reference.generate(
        tokens[None, :40], attention_mask=torch.ones(1, 40, dtype=torch.int64), max_new_tokens=13, do_sample=False
    )[0, 40:]
    # the pool's bf16 may tip a word that is nearly a tie; from KV in float32 the words are the same
    exact = CausalLM.load(TINY, dtype=torch.float32)
    kv = exact.prefill(tokens[:39])
    made = exact.generate_greedy(kv, tokens[:40], 13)
    assert made[: len(expected)].tolist() == expected.tolist()
    assert kv[Side.KEY].shape[1] == 39
    assert exact.generate_greedy(head(kv, 7), tokens[:40], 13).tolist() == made.tolist()
    assert exact.generate_greedy(kv, tokens[:40], 0).tolist() == []


def test_kv_that_does_not_fit_is_refused(model, tokens):
    kv = model.prefill(tokens[:5])
    with pytest.raises(ValueError, match="leaves nothing"):
        model.generate_greedy(kv, tokens[:5], 1)
    with pytest.raises(ValueError, match="keys of"):
        model.continue_from(kv, tokens[:6], tokens[6:9])
    with pytest.raises(ValueError, match="values of"):
        model.continue_from({**kv, Side.VALUE: kv[Side.VALUE][:, :, :1]}, tokens[:5], tokens[5:7])


def test_gradients_predict_what_a_small_change_does(model, tokens):
    """The score is the derivative of the log-likelihood of the drawn labels, so it must agree with a difference."""
    prefix, continuation = tokens[:29], tokens[29:40]
    kv = {side: tensor.float() for side, tensor in model.prefill(prefix).items()}
    (score,) = model.kv_gradients(kv, continuation, 1, torch.Generator().manual_seed(5))
    untouched = model.continue_from(kv, prefix, continuation).log_softmax(-1)
    labels = torch.multinomial(untouched.exp(), 1, generator=torch.Generator().manual_seed(5))
    for side in kv:
        assert score[side].shape == kv[side].shape
        assert score[side].dtype == torch.float32
        direction = torch.randn(kv[side].shape, generator=torch.Generator().manual_seed(11))
        step = 1e-3 * direction

        def log_likelihood(sign, side=side, step=step):
            moved = {**kv, side: kv[side] + sign * step}
            return float(model.continue_from(moved, prefix, continuation).log_softmax(-1).gather(1, labels).sum())

        measured = (log_likelihood(1) - log_likelihood(-1)) / 2
        assert measured == pytest.approx(float((score[side] * step).sum()), rel=0.03, abs=1e-5)


def test_scores_average_out_and_repeat(model, tokens):
    kv = model.prefill(tokens[:17])
    drawn = list(model.kv_gradients(kv, tokens[17:20], 64, torch.Generator().manual_seed(3)))
    again = next(model.kv_gradients(kv, tokens[17:20], 1, torch.Generator().manual_seed(3)))
    assert torch.equal(drawn[0][Side.KEY], again[Side.KEY])
    assert not torch.equal(drawn[0][Side.KEY], drawn[1][Side.KEY])
    values = torch.stack([score[Side.VALUE] for score in drawn])
    # labels come from the model's own distribution, under which the expected score is zero
    assert values.mean(0).norm() < 0.35 * values.pow(2).mean(0).sum().sqrt()


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
        ),
        transformers.GPT2Config(vocab_size=4096, n_positions=64, n_embd=48, n_layer=3, n_head=3),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_need_no_code(tmp_path, config):
    model = CausalLM.load(make_model(tmp_path, config), dtype=torch.float32)
    tokens = model.encode(TEXT)[:23]
    kv = model.prefill(tokens[:11])
    heads = 1 if config.model_type == "llama" else 3
    assert kv[Side.VALUE].shape == (config.num_hidden_layers, 11, heads, 16)
    whole = model.continue_from(head(kv, 0), tokens[:0], tokens)
    torch.testing.assert_close(model.continue_from(kv, tokens[:11], tokens[11:]), whole[11:], rtol=1e-4, atol=1e-5)
    (score,) = model.kv_gradients(kv, tokens[11:], 1, torch.Generator().manual_seed(1))
    assert score[Side.KEY].abs().sum() > 0


def as_llama_cpp_stores(name, weight, heads, kv_heads):
    """Rows of a rotated projection pair neighbours in a GGUF file, halves in transformers."""
    count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
    if count is None:
        return weight
    return weight.reshape(count, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(path, directory):
    """The model in ``directory`` as a GGUF file, weights as they are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config, tokenizer = model.config, json.loads((TINY / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = as_llama_cpp_stores(name, weight, config.num_attention_heads, config.num_key_value_heads)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_what_the_directory_gives(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    expected = CausalLM.load(make_model(tmp_path / "directory", config))
    write_gguf(tmp_path / "model.gguf", tmp_path / "directory")
    model = CausalLM.load(tmp_path / "model.gguf")
    tokens = expected.encode(TEXT)
    assert model.encode(TEXT).tolist() == tokens.tolist()
    assert model.kv_spec(16) == KVSpec(2, 1, 32, 16, KVDtype.BFLOAT16)
    for side, tensor in model.prefill(tokens).items():
        torch.testing.assert_close(tensor, expected.prefill(tokens)[side])
    torch.testing.assert_close(
        model.continue_from(model.prefill(tokens[:9]), tokens[:9], tokens[9:]),
        expected.continue_from(expected.prefill(tokens[:9]), tokens[:9], tokens[9:]),
    )


SLIDING = {
    "vocab_size": 4096,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 13,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(**SLIDING),
        transformers.Gemma3TextConfig(**SLIDING, **KINDS, query_pre_attn_scalar=16),
        transformers.Cohere2Config(**SLIDING, **KINDS),
        transformers.MellumConfig(**SLIDING, **KINDS, mlp_layer_types=["dense"] * 3),
        transformers.GptOssConfig(**SLIDING, **KINDS, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=lambda config: config.model_type,
)
def test_a_sliding_window_is_looked_through_from_kv_of_all_tokens(tmp_path, config):
    config.initializer_range = 0.3
    path = make_model(tmp_path, config)
    model = CausalLM.load(path, dtype=torch.float32)
    tokens = model.encode(TEXT * 2)[:61]
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        # Its own cache, which keeps the window alone.
        whole = reference(tokens[None], use_cache=True)
    kept = whole.past_key_values.layers[0]
    assert kept.keys.shape[2] < 13
    kv = model.prefill(tokens)
    assert {tuple(tensor.shape) for tensor in kv.values()} == {(3, 61, 1, 16)}
    torch.testing.assert_close(kv[Side.KEY][0, -kept.keys.shape[2] :], kept.keys[0].transpose(0, 1))
    for cut in (1, 12, 13, 37, 60):
        logits = model.continue_from(head(kv, cut), tokens[:cut], tokens[cut:])
        torch.testing.assert_close(logits, whole.logits[0, cut:], rtol=1e-3, atol=1e-3)
    # The first layer has a window: a token far behind it is never looked at there, one within it is.
    for token, is_seen in ((20, False), (35, True)):
        disturbed = {side: tensor.clone() for side, tensor in head(kv, 40).items()}
        disturbed[Side.VALUE][0, token] += 100
        logits = model.continue_from(disturbed, tokens[:40], tokens[40:41])
        assert bool((logits[0] - whole.logits[0, 40]).abs().max() > 1e-2) is is_seen


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            transformers.DeepseekV2Config(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=32,
                moe_intermediate_size=16,
                n_routed_experts=2,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=8,
            ),
            "MLA.*--kvcodec-auto-calibrate",
        ),
        (
            transformers.Qwen3NextConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_experts=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
            ),
            "linear attention",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_with_another_state_are_refused_in_a_sentence(tmp_path, config, words):
    with pytest.raises(UnsupportedError, match=words):
        CausalLM.load(make_model(tmp_path, config))


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match="can't use device 'abacus'"):
        CausalLM.load(TINY, "abacus")
    with pytest.raises(ConfigurationError, match="there is no model at"):
        CausalLM.load(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="can't load a decoder"):
        CausalLM.load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ConfigurationError, match="can't load a decoder"):
        CausalLM.load(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="can't load a decoder"):
        CausalLM.load(tmp_path)
