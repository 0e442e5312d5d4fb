"""Starting: the flags, what is refused and in which words, and the Python API."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from integration.cluster import MODEL

from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import CPU_ENV, KVCodecArgs, ProcessError, SGLangProcess

pytestmark = pytest.mark.sglang

_PARSE = """
import json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
import sglang
load_plugins()
for argv in json.loads(sys.argv[1]):
    if argv[0] == "sglang-version":
        sglang.__version__ = argv.pop(1)
        argv.pop(0)
    try:
        said = "started: " + str(prepare_server_args(argv).page_size)
    except SystemExit as exit:
        said = str(exit)
    print("SAID", json.dumps(said))
"""

_MODEL = ["--model-path", MODEL, "--device", "cpu"]
_ASKED = [*_MODEL, "--enable-kvcodec"]
_FULL = [*_ASKED, "--kvcodec-remote", "grpc://127.0.0.1:1"]
_CASES = {
    "no peer given": (_ASKED, "needs a storage peer"),
    "bad address": ([*_ASKED, "--kvcodec-remote", "http://h:1"], "not a peer's address"),
    "unknown profile": ([*_FULL, "--kvcodec-profile", "best"], "unknown profile 'best'"),
    "bad size": ([*_FULL, "--kvcodec-host-cache", "lots"], "not a size"),
    "page size": ([*_FULL, "--page-size", "1"], "page size of 16 to 256"),
    "no radix cache": ([*_FULL, "--disable-radix-cache"], "--disable-radix-cache"),
    "hierarchical cache": ([*_FULL, "--enable-hierarchical-cache"], "--enable-hierarchical-cache"),
    "pipeline": ([*_FULL, "--kvcodec-profile", "high,balanced", "--pp-size", "2"], "pipeline parallelism"),
    "other version": (["sglang-version", "0.5.24", *_FULL], "works with SGLang 0.5.23, and this is 0.5.24"),
}


def _child_env() -> dict[str, str]:
    return {**os.environ, **CPU_ENV}


def test_what_can_not_be_had_is_refused_in_one_sentence():
    cases = [argv for argv, _ in _CASES.values()]
    ran = subprocess.run(
        [sys.executable, "-c", _PARSE, json.dumps(cases)], env=_child_env(), capture_output=True, text=True, check=True
    )
    said = [json.loads(line.removeprefix("SAID ")) for line in ran.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == len(cases)
    for (name, (_, words)), sentence in zip(_CASES.items(), said, strict=True):
        assert sentence.startswith("sglang-kvcodec: "), (name, sentence)
        assert words in sentence, (name, sentence)
        assert "\n" not in sentence


_SGLANG = "from sglang.cli.main import main; main()"


@pytest.mark.parametrize(
    ("command", "platform"),
    [(["-m", "sglang.launch_server"], CPU_ENV["SGLANG_PLATFORM"]), (["-c", _SGLANG, "serve"], "")],
    ids=["launch_server", "serve"],
)
def test_help_shows_the_flags(command, platform):
    ran = subprocess.run(
        [sys.executable, *command, "--help"],
        env={**_child_env(), "SGLANG_PLATFORM": platform},
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in ("--enable-kvcodec", "--kvcodec-remote", "--kvcodec-profile", "--kvcodec-host-cache"):
        # In the usage and beside its help.
        assert len(re.findall(rf"{flag}\b", ran.stdout)) == 2


def test_a_pool_that_can_not_be_coded_is_refused(tmp_path):
    args = KVCodecArgs("grpc://127.0.0.1:1")
    with (
        SGLangProcess("fp32", MODEL, tmp_path / "log", args, extra_args=["--dtype", "float32"]) as server,
        pytest.raises(ProcessError),
    ):
        server.wait_ready()
    assert "sglang-kvcodec: a KV cache of float32 can't be coded" in (tmp_path / "log").read_text()


_ENGINE = """
import json, sys, time

import sglang


def main():
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native", sampling_backend="pytorch",
        max_total_tokens=8192, mem_fraction_static=0.3, radix_cache_backend="kvcodec",
    )
    prompt = open(sys.argv[2]).read()
    replies = []
    # Publishing goes on in the background, for as long as a busy machine needs.
    while not replies or not (replies[-1][1] or {}).get("storage") and len(replies) < 40:
        if replies:
            time.sleep(2)
            engine.flush_cache()
            # The coded pages in host memory too: what is left is the peer's.
            engine.loop.run_until_complete(engine.tokenizer_manager.clear_hicache_storage())
        reply = engine.generate(prompt, {"temperature": 0, "max_new_tokens": 8})
        replies.append([reply["text"], reply["meta_info"]["cached_tokens_details"]])
    print("SAID", json.dumps([replies[0], replies[-1]]))
    engine.shutdown()


if __name__ == "__main__":
    main()
"""


def test_the_python_api_takes_its_settings_from_the_environment(tmp_path):
    script = tmp_path / "engine_script.py"
    script.write_text(_ENGINE)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(pathlib.Path(json.__file__).read_text()[:1500])
    with PeerProcess() as peer:
        ran = subprocess.run(
            [sys.executable, str(script), MODEL, str(prompt)],
            # Always: such a small model may well be faster than the link of a busy machine.
            env={**_child_env(), "KVCODEC_REMOTE": peer.remote, "KVCODEC_PLAN": "always"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = next(line for line in ran.stdout.splitlines() if line.startswith("SAID "))
    first, second = json.loads(said.removeprefix("SAID "))
    assert first[0] == second[0]
    assert second[1]["storage"] > 0
    assert second[1]["storage_backend"] == "kvcodec"
