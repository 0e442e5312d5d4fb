import logging
import types

import pytest
from sglang.srt.arg_groups import resolution_hooks
from sglang.srt.utils import common

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.plugin import hooks
from sglang_kvcodec.plugin.gpu_memory import keep_room, lowered_fraction

GIB = 1 << 30


def server_args(backend="kvcodec", device="cuda", fraction=0.85, **given):
    settings = {"remote": "grpc://peer:7000", **given}
    return types.SimpleNamespace(
        radix_cache_backend=backend, device=device, mem_fraction_static=fraction, _kvcodec_settings=settings
    )


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    monkeypatch.setattr(common, "get_device_memory_capacity", lambda device: 80 << 10)


def declared(args):
    return [fields for source, fields in getattr(args, "_resolved_overrides", []) if source == "kvcodec"]


@pytest.mark.parametrize("fraction", [0.85, 0.6])
def test_sglang_takes_less_by_what_kvcodec_may_take(fraction, caplog):
    args = server_args(fraction=fraction)
    with caplog.at_level(logging.INFO):
        keep_room(args)
    [fields] = declared(args)
    # What SGLang leaves is a share of what is free before the model is loaded: a device without what CUDA takes.
    left_bytes = (fraction - fields["mem_fraction_static"]) * 79 * GIB
    assert GIB <= left_bytes < 1.1 * GIB
    assert "leaves 1024 MiB to decoders" in caplog.text


def test_the_room_is_the_operators(caplog):
    args = server_args(gpu_memory_bytes="4GiB")
    keep_room(args)
    assert (0.85 - declared(args)[0]["mem_fraction_static"]) * 79 * GIB >= 4 * GIB


@pytest.mark.parametrize(
    "args",
    [
        server_args(backend=None),
        server_args(backend="lru"),
        server_args(device="cpu"),
        server_args(fraction=None),
        server_args(profile="raw"),
    ],
)
def test_other_servers_are_left_alone(args):
    keep_room(args)
    assert declared(args) == []


def test_a_gpu_of_unknown_size_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(common, "get_device_memory_capacity", lambda device: None)
    args = server_args()
    keep_room(args)
    assert declared(args) == []
    assert "leave 1024 MiB" in caplog.text


def test_room_for_more_than_there_is_is_refused():
    with pytest.raises(ConfigurationError, match="leave nothing"):
        lowered_fraction(0.1, 10 * GIB, GIB)
    assert lowered_fraction(0.9, 10 * GIB, GIB) == pytest.approx(0.795, abs=1e-3)


def test_it_is_hooked_in_after_sglang_has_settled_its_share(monkeypatch):
    calls = []
    args = server_args(fraction=None)
    monkeypatch.setattr(hooks, "keep_room", lambda args: calls.append(args.mem_fraction_static))

    def settle(args):
        args.mem_fraction_static = 0.7

    monkeypatch.setitem(resolution_hooks._HOOKS, "handle_gpu_memory_settings", [hooks._around_gpu_memory])
    settle.__name__ = "handle_gpu_memory_settings"
    resolution_hooks.run_hook(settle, args)
    assert calls == [0.7]


def test_a_refusal_ends_a_server_that_was_asked_for_on_the_command_line():
    args = server_args(fraction=0.01)
    with pytest.raises(SystemExit, match="sglang-kvcodec: 1024 MiB"):
        hooks._around_gpu_memory(args, lambda args: None)
