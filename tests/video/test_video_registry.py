import dataclasses
import logging

import pytest

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.video import open_decoder, open_encoder, probe, registry


def test_probe_names_every_backend_with_a_reason():
    statuses = probe()
    assert [(s.name, s.direction, s.available) for s in statuses] == [
        ("software", "encode", True),
        ("software", "decode", True),
    ]
    assert "libx265" in statuses[0].reason


@pytest.mark.parametrize("opener", [open_encoder, open_decoder])
def test_auto_picks_the_first_available_and_says_so(opener, caplog):
    with caplog.at_level(logging.INFO, logger="sglang_kvcodec.video.registry"):
        assert opener("auto").name == "software"
    assert "'software'" in caplog.text


@pytest.mark.parametrize("opener", [open_encoder, open_decoder])
def test_an_unknown_backend_is_refused_with_the_known_ones(opener):
    with pytest.raises(ConfigurationError, match=r"'nvdec'.*there are software"):
        opener("nvdec")


@pytest.mark.parametrize("name", ["auto", "software"])
def test_a_backend_that_is_not_available_is_refused_with_the_reason(name, monkeypatch):
    backend, opener = registry._ENCODERS["software"]
    absent = dataclasses.replace(backend, ffmpeg_codec="no_such_codec")
    monkeypatch.setitem(registry._ENCODERS, "software", (absent, opener))
    with pytest.raises(ConfigurationError, match="has no no_such_codec"):
        open_encoder(name)
