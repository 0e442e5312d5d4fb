"""The probe of video engines: it survives whatever the child does."""

import dataclasses
import json
import sys

import pytest

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.testing.rehearsal import PyNvVCException, RehearsalDriver, RehearsalLibrary
from sglang_kvcodec.video import nvidia
from sglang_kvcodec.video.nvidia import NvidiaFacts, ask_child, find_facts, load_library, probe_nvidia

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _forget():
    probe_nvidia.cache_clear()
    yield
    probe_nvidia.cache_clear()


def child(code, timeout_s=LIMIT_S):
    return ask_child([sys.executable, "-c", code], timeout_s)


def test_facts_pass_from_the_child():
    facts = NvidiaFacts("GPU X", "12.9", "2.2.4", "", 7, {"width_max": 8192}, "no engine", 0)
    assert child(f"print('noise'); print({json.dumps(dataclasses.asdict(facts))!r})") == facts


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "import os; print('importing ...', flush=True); print('[FATAL] CUDA'); os._exit(1)",
            "status 1 while importing: [FATAL] CUDA",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("print('no json')", "status 0: no json"),
        ("print('[]')", "status 0"),
        ("print('{\"unheard\": 1}')", "status 0"),
        ("", "status 0"),
    ],
)
def test_whatever_becomes_of_the_child_is_a_reason(code, problem):
    facts = child(code)
    assert problem in facts.decode_problem
    assert problem in facts.encode_problem
    assert facts.gpu == ""


def test_a_child_that_hangs_is_ended():
    assert "did not end in 0.2 s" in child("import time; time.sleep(1000)", 0.2).decode_problem


def test_engines_are_tried_and_counted():
    steps = []
    facts = find_facts(RehearsalLibrary(engines=5), RehearsalDriver(), steps.append)
    assert (facts.decode_problem, facts.decode_engines) == ("", 5)
    assert facts.decode_limits["height_max"] == 8192
    assert (facts.encode_problem, facts.encode_engines) == ("", 1)
    assert len(steps) == 4


def test_a_device_without_an_encoder_still_decodes():
    facts = find_facts(RehearsalLibrary(has_encoder=False), RehearsalDriver())
    assert facts.decode_problem == ""
    assert "no engine for lossless HEVC" in facts.encode_problem


def test_an_engine_that_fails_or_lies_can_not_be_had(monkeypatch):
    library = RehearsalLibrary()
    library.encodes_wrongly = True
    library.fail_next(PyNvVCException("level 8.5"))
    facts = find_facts(library, RehearsalDriver())
    assert "level 8.5" in facts.decode_problem
    assert "not lossless" in facts.encode_problem
    driver = RehearsalDriver()
    monkeypatch.setattr(driver, "copy_to_host", lambda target, *rest: target.fill(7))
    assert "other samples" in find_facts(RehearsalLibrary(), driver).decode_problem


def test_a_decoder_that_says_no_is_not_tried(monkeypatch):
    library = RehearsalLibrary()
    monkeypatch.setattr(library, "GetDecoderCaps", lambda **asked: {"supported": 0})
    assert "does not decode" in find_facts(library, RehearsalDriver()).decode_problem
    assert library.created == []


def test_limits_that_are_not_told_are_tried(monkeypatch):
    library = RehearsalLibrary()

    def no_answer(**asked):
        raise RuntimeError("cuvid")

    monkeypatch.setattr(library, "GetDecoderCaps", no_answer)
    facts = find_facts(library, RehearsalDriver())
    assert (facts.decode_problem, facts.decode_engines, facts.decode_limits) == ("", 1, {})


def test_without_the_wheel_no_process_is_started(monkeypatch):
    monkeypatch.setattr(nvidia, "PACKAGE", "no_such_package")
    monkeypatch.setattr(nvidia, "ask_child", lambda *asked: pytest.fail("started a process"))
    assert probe_nvidia(0).decode_problem == "no_such_package is not installed"


def test_without_a_driver_no_process_is_started(monkeypatch):
    monkeypatch.setattr(nvidia, "PACKAGE", "numpy")
    monkeypatch.setattr(nvidia, "LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(nvidia, "ask_child", lambda *asked: pytest.fail("started a process"))
    assert "no NVIDIA driver" in probe_nvidia(0).encode_problem


def test_the_real_child_says_why_it_can_not(monkeypatch):
    """On a machine without a driver; with one, the wheel may be missing, or all is well."""
    facts = ask_child(nvidia.child_command(0), LIMIT_S)
    if facts.gpu:
        assert facts.library
    else:
        assert facts.decode_problem


def test_an_import_that_fails_is_a_codec_error_of_one_line(monkeypatch, tmp_path):
    (tmp_path / "PyNvVideoCodec.py").write_text("raise RuntimeError('no libnvidia-encode\\n\\n=== TROUBLE ===')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
    with pytest.raises(CodecError, match=r"^PyNvVideoCodec can't be imported: no libnvidia-encode$"):
        load_library()
