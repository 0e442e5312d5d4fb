import logging
import types

import pytest

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.plugin.radix_cache import build_radix_cache


@pytest.mark.parametrize(
    ("swa", "ssm", "named"),
    [
        (True, False, "sliding-window layers that have a KV pool of their own"),
        (False, True, "state-space or linear-attention layers"),
        (True, True, "state-space or linear-attention layers"),
    ],
)
def test_a_model_with_layers_of_other_kinds_is_refused_by_their_names(swa, ssm, named, caplog):
    ctx = types.SimpleNamespace(disable_radix_cache=False, is_hybrid_swa=swa, is_hybrid_ssm=ssm)
    with caplog.at_level(logging.ERROR), pytest.raises(UnsupportedError, match=named) as caught:
        build_radix_cache(ctx)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in caplog.text
