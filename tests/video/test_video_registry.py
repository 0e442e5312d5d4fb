import logging

import pytest
from prometheus_client import REGISTRY

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.testing.rehearsal import RehearsalDriver, RehearsalLibrary
from sglang_kvcodec.video import open_decoder, open_decoders, open_encoder, open_encoders, probe, registry
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
from sglang_kvcodec.video.nvdec import NvdecDecoders
from sglang_kvcodec.video.nvidia import NvidiaFacts

HOPPER = NvidiaFacts("a Hopper", "13.0", "2.2.4", "", 7, {}, "the device has no engine for lossless HEVC", 0)
ADA = NvidiaFacts("an Ada", "13.0", "2.2.4", "", 3, {}, "", 3)


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretends that the probe of a device found something."""

    def pretend(facts):
        monkeypatch.setattr(registry, "probe_nvidia", lambda device: facts)
        monkeypatch.setattr(registry, "load_library", RehearsalLibrary)
        monkeypatch.setattr(registry, "CudaDriver", RehearsalDriver)

    return pretend


def test_probe_names_every_backend_with_a_reason():
    statuses = probe()
    assert [(s.name, s.direction, s.available) for s in statuses] == [
        ("nvenc", "encode", False),
        ("x265", "encode", True),
        ("nvdec", "decode", False),
        ("software", "decode", True),
    ]
    assert "not on a CUDA device" in statuses[0].reason
    assert "libx265" in statuses[1].reason


def test_auto_picks_the_first_available_and_says_so_with_what_it_could_not_have(caplog):
    with caplog.at_level(logging.INFO, logger="sglang_kvcodec.video.registry"):
        assert open_encoders(processes=0).name == "x265"
        assert open_decoders(threads=3).name == "software"
    assert "encode pictures with 'x265'" in caplog.text
    assert "not available: nvdec: the KV pool is not on a CUDA device" in caplog.text
    assert REGISTRY.get_sample_value("kvcodec_backend", {"direction": "decode", "name": "software"}) == 1


def test_auto_takes_the_engines_that_are_there(on_gpu):
    on_gpu(HOPPER)
    decoders = open_decoders(threads=2, device=1)
    assert isinstance(decoders, NvdecDecoders)
    assert decoders.threads == 14
    assert open_encoders(processes=0, device=1).name == "x265"
    on_gpu(ADA)
    assert open_encoders(processes=0, device=1).name == "nvenc"


def test_the_operator_has_the_last_word(on_gpu):
    on_gpu(ADA)
    assert open_decoders("software", threads=2, device=0).name == "software"
    assert open_encoders("x265", processes=0, device=0).name == "x265"


def test_what_was_asked_for_is_never_swapped_for_another(on_gpu):
    on_gpu(HOPPER)
    with pytest.raises(ConfigurationError, match="'nvenc' can't encode pictures here: the device has no engine"):
        open_encoders("nvenc", processes=1, device=0)
    with pytest.raises(ConfigurationError, match="'nvdec' can't decode pictures here: the KV pool is not"):
        open_decoders("nvdec", threads=1)


def test_x265_runs_in_processes_if_there_are_to_be_any():
    encoders = open_encoders(processes=1)
    assert isinstance(encoders, EncoderProcesses)
    encoders.close()
    assert not isinstance(open_encoders(processes=0), EncoderProcesses)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"unknown backend 'cuvid'.*there are auto, nvdec, software"):
        open_decoders("cuvid", threads=1)
    for opener in (open_encoder, open_decoder):
        with pytest.raises(ConfigurationError, match="unknown backend 'cuvid'"):
            opener("cuvid")


def test_a_backend_that_is_not_available_is_refused_with_the_reason(monkeypatch):
    inner = registry._ffmpeg
    monkeypatch.setattr(
        registry, "_ffmpeg", lambda name, direction, *rest: inner(name, direction, "no_such_codec", "w")
    )
    for name in ("auto", "x265"):
        with pytest.raises(ConfigurationError, match="has no no_such_codec"):
            open_encoders(name, processes=0)
    with pytest.raises(ConfigurationError, match="has no no_such_codec"):
        open_encoder()
