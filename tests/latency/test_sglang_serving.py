"""The arguments of SGLang's load generator; that it runs is a test of the whole, with real servers."""

import importlib.util
import json
import pathlib
import sys

import pytest

from sglang_kvcodec.latency import sglang_serving
from sglang_kvcodec.latency.loads import Load
from sglang_kvcodec.latency.sglang_serving import ServingLoad, run_serving
from sglang_kvcodec.testing.processes import ProcessError

RESULT = {
    "completed": 4,
    "duration": 1.23456,
    "mean_ttft_ms": 5.0,
    "median_ttft_ms": 4.0,
    "p99_ttft_ms": 9.0,
    "request_throughput": 3.0,
    "input_throughput": 30.0,
    "output_throughput": 2.0,
    "total_throughput": 32.0,
    "cache_report": {"device_cached_tokens": 64, "host_cached_tokens": None, "storage_cached_tokens": 128},
}


def load(kind="shared-prefix"):
    return ServingLoad("/models/m", Load(kind, 640, 3, 8), prefixes=2, concurrency=1)


def test_sglang_knows_all_arguments():
    """Every option is one of the installed generator."""
    spec = importlib.util.find_spec("sglang.benchmark.serving")
    source = pathlib.Path(spec.origin).read_text()
    for argument in load().arguments("http://127.0.0.1:1", pathlib.Path("out.jsonl")):
        if argument.startswith("--"):
            assert f'"{argument}"' in source, argument


@pytest.mark.parametrize(("kind", "turns"), [("shared-prefix", "1"), ("multi-turn", "3")])
def test_turns_are_those_of_the_load(kind, turns, tmp_path):
    arguments = load(kind).arguments("http://h:1", tmp_path / "o")
    assert arguments[arguments.index("--gsp-num-turns") + 1] == turns
    assert arguments[arguments.index("--gsp-system-prompt-len") + 1] == "640"
    assert arguments[arguments.index("--num-prompts") + 1] == "4"


@pytest.fixture
def generator(monkeypatch, tmp_path):
    """Another program in the generator's place."""

    def use(script):
        (tmp_path / "program.py").write_text(script)
        stand_in = tmp_path / "python"
        stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/program.py "$@"\n')
        stand_in.chmod(0o755)
        monkeypatch.setattr(
            sglang_serving,
            "ManagedProcess",
            lambda name, command, log, real=sglang_serving.ManagedProcess: real(
                name, [str(stand_in), *command[1:]], log
            ),
        )

    return use


def writes(result):
    return (
        "import sys\nout = sys.argv[sys.argv.index('--output-file') + 1]\n"
        f"open(out, 'a').write({json.dumps(result)!r} + '\\n')\n"
    )


def test_its_figures_have_units(generator, tmp_path):
    generator(writes(RESULT))
    figures = run_serving(load(), "http://h:1", "a-run", tmp_path)
    assert figures["median_ttft_ms"] == 4.0
    assert figures["duration_s"] == 1.235
    assert figures["output_tokens_per_s"] == 2.0
    assert (figures["cached_device_tokens"], figures["cached_host_tokens"], figures["cached_storage_tokens"]) == (
        *(64, 0, 128),
    )


def test_a_generator_that_fails_is_told_with_its_log(generator, tmp_path):
    generator("import sys\nprint('no tokenizer here')\nsys.exit(3)\n")
    with pytest.raises(ProcessError, match=r"(?s)a-run ended with 3.*no tokenizer here"):
        run_serving(load(), "http://h:1", "a-run", tmp_path)


def test_requests_that_failed_are_no_result(generator, tmp_path):
    generator(writes({**RESULT, "completed": 3}))
    with pytest.raises(ProcessError, match="completed 3 of at least 4 requests"):
        run_serving(load(), "http://h:1", "a-run", tmp_path)
