import types

import pytest
from sglang.srt.configs.model_config import AttentionArch

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.plugin.layer_kinds import check_layer_kinds, suit_layer_kinds


def model(**changes):
    """What SGLang knows of a model with sliding windows that can be coded."""
    fields = {
        "is_hybrid_swa": True,
        "is_hybrid_swa_compress": False,
        "attention_arch": AttentionArch.MHA,
        "head_dim": 80,
        "v_head_dim": 80,
        "swa_head_dim": 80,
        "swa_v_head_dim": 80,
        "get_num_kv_heads": lambda tp_size: 3,
        "get_swa_num_kv_heads": lambda tp_size: 3,
    }
    return types.SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize("is_hybrid", [True, False])
def test_layers_whose_kv_has_one_shape_can_be_coded(is_hybrid):
    check_layer_kinds(model(is_hybrid_swa=is_hybrid), has_state=False)


@pytest.mark.parametrize(
    ("changes", "has_state", "words"),
    [
        ({}, True, "state-space or linear-attention layers.*without their state"),
        ({"is_hybrid_swa": False}, True, "without their state"),
        ({"is_deepseek_v4_arch": True}, False, "another shape"),
        ({"attention_arch": AttentionArch.MLA}, False, "another shape"),
        ({"is_hybrid_swa_compress": True}, False, "another shape"),
        ({"swa_head_dim": 40}, False, "another shape"),
        ({"swa_v_head_dim": 40}, False, "another shape"),
        ({"get_swa_num_kv_heads": lambda tp_size: 6}, False, "another shape"),
    ],
)
def test_what_can_not_be_coded_is_refused_in_a_sentence(changes, has_state, words):
    with pytest.raises(UnsupportedError, match=words) as caught:
        check_layer_kinds(model(**changes), has_state)
    assert "\n" not in str(caught.value)


def test_a_server_without_kvcodec_is_left_alone():
    # No attribute but this one is looked at, and nothing is read.
    suit_layer_kinds(types.SimpleNamespace(radix_cache_backend="lru"))
