"""When the platform answers, and what it does for the help of ``sglang serve``."""

import sys

import pytest

from sglang_kvcodec.plugin import hooks
from sglang_kvcodec.plugin.cpu_platform import PlainCpuPlatform, resolve


@pytest.mark.parametrize(("selected", "found"), [("kvcodec_cpu", True), ("another", False), ("", False)])
def test_the_platform_is_there_only_by_name(monkeypatch, selected, found):
    monkeypatch.setenv("SGLANG_PLATFORM", selected)
    assert (resolve() == "sglang_kvcodec.plugin.cpu_platform.PlainCpuPlatform") is found


@pytest.mark.parametrize(
    ("arguments", "loads"),
    [
        (["serve", "--help"], True),
        (["serve", "--model-type", "llm", "-h"], True),
        (["serve"], False),
        (["serve", "--model-path", "m"], False),
        (["--help"], False),
        (["generate", "--help"], False),
        ([], False),
    ],
)
def test_plugins_are_loaded_early_only_for_the_help_of_serve(monkeypatch, arguments, loads):
    calls = []
    monkeypatch.setattr(hooks, "load_plugins_for_serve_help", lambda: calls.append(None))
    monkeypatch.setattr(sys, "argv", ["sglang", *arguments])
    resolve()
    assert len(calls) == loads


def test_models_with_latent_attention_look_at_the_pool_alone(monkeypatch):
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    monkeypatch.setattr(AttentionBackendRegistry, "_handlers", {})
    PlainCpuPlatform().init_backend()
    method = AttentionBackendRegistry.get_handler("torch_native")
    assert method(None, None) is AttnForwardMethod.MLA
