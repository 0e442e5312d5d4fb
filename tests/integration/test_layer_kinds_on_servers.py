"""Models with latents instead of keys and values, and with layers of different kinds, on servers of their own."""

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import urllib.request

import pytest
from integration import tiny_models
from integration.cluster import PAGE_TOKENS, forget, metric, wait_for, wait_up

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import Side
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.processes import CPU_ENV, KVCodecArgs, SGLangProcess

pytestmark = pytest.mark.sglang

PROMPT_TOKENS = 500
STORED_PAGES = PROMPT_TOKENS // PAGE_TOKENS
ANSWER_TOKENS = 16
CHUNKED = ("--chunked-prefill-size", "256")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model and what is to be seen of it.

    Attributes:
        make: writes it.
        sides: of its pages.
        plain_args: of a server without kvcodec. On a pool of their own for layers with a window, SGLang's plain PyTorch
            attention reads the slots of the other pool (``torch_native_backend.py``), so the truth is a server without.
    """

    make: object
    sides: tuple[Side, ...]
    plain_args: tuple[str, ...] = ()


KINDS = {
    "latent": Kind(tiny_models.latent, (Side.LATENT,)),
    "sliding": Kind(tiny_models.sliding, (Side.KEY, Side.VALUE), ("--disable-hybrid-swa-memory",)),
}


class KeptPages(MemoryEngine):
    """Remembers all that was put."""

    def __init__(self):
        super().__init__(1 << 30)
        self.pages: list[PageObject] = []

    def put(self, key, value):
        self.pages.append(PageObject(bytes(value)))
        return super().put(key, value)


class Site:
    """A peer of a test's own, with servers at it."""

    def __init__(self, kind: Kind, work_dir, stack):
        self.engine = KeptPages()
        self.model = kind.make(work_dir / "model")
        self._peer = LocalPeer(self.engine)
        self.remote = self._peer.remote
        self._work_dir, self._stack = work_dir, stack
        stack.callback(self._peer.stop)

    def start(self, name, *extra_args, profile=None, kvcodec_args=(), env=None) -> SGLangProcess:
        """A server that is ready; without kvcodec if it has no profile."""
        args = KVCodecArgs(self.remote, profile, tuple(kvcodec_args)) if profile else None
        log = self._work_dir / f"{name}.log"
        server = SGLangProcess(name, self.model, log, args, extra_args=[*CHUNKED, *extra_args], env=env)
        self._stack.callback(server.kill)
        server.wait_ready()
        if profile:
            wait_up(server)
        return server


@pytest.fixture
def new_site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda kind: Site(KINDS[kind], tmp_path, stack)


def drawn_prompts(count: int) -> list[list[int]]:
    drawn = random.Random(5)
    return [[drawn.randrange(300, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def generate(server: SGLangProcess, tokens: list[int]) -> tuple[list[int], int]:
    """The words that follow a prompt, and how many of its tokens came from the peer."""
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_cached_tokens_details": True}
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        reply = json.load(response)
    return reply["output_ids"], (reply["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_restored_gives_the_words_of_a_server_without_kvcodec(new_site, kind):
    site = new_site(kind)
    prompts = drawn_prompts(3)
    # The third leaves the first in the middle: its first pages are those of the first.
    prompts.append(prompts[0][: 3 * PAGE_TOKENS + 7] + prompts[1][:300])
    plain = site.start("plain", *KINDS[kind].plain_args)
    answers = [generate(plain, tokens)[0] for tokens in prompts]
    # Once more, each behind what it holds itself: as many tokens are left to compute as behind what is restored.
    again = [generate(plain, tokens)[0] for tokens in prompts]
    assert len({tuple(words) for words in answers}) == len(prompts), "words that do not hang on the prompt show nothing"
    plain.kill()

    a = site.start("a", profile="exact")
    assert [generate(a, tokens)[0] for tokens in prompts] == answers
    assert a.client.wait_published()
    assert {page.header.spec.sides for page in site.engine.pages} == {KINDS[kind].sides}
    assert {page.header.profile_name for page in site.engine.pages} == {"exact"}
    log = a.log_text()
    a.kill()
    b = site.start("b", profile="exact")
    for tokens, words in zip(prompts, again, strict=True):
        forget(b)
        found, stored = generate(b, tokens)
        assert stored == (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS
        assert found == words
    assert metric(b, "kvcodec_restore_failures_total") == 0
    said = [line for line in log.splitlines() if "the KV of every token" in line]
    assert len(said) == (1 if kind == "sliding" else 0)
    if said:
        assert "the 5 layers of this model that have a sliding window" in said[0]


def test_each_rank_stores_the_latents_that_it_holds(new_site):
    site = new_site("latent")
    server = site.start("tp2", "--tp", "2", profile="exact", env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    (tokens,) = drawn_prompts(1)
    words, _ = generate(server, tokens)
    assert server.client.wait_published()
    wait_for(lambda: len(site.engine.pages) >= 2 * STORED_PAGES, "pages of both ranks")
    namespaces = {page.header.key.namespace_digest for page in site.engine.pages}
    assert len(namespaces) == 2
    forget(server)
    assert generate(server, tokens) == (words, STORED_PAGES * PAGE_TOKENS)
    assert metric(server, "kvcodec_restore_failures_total") == 0


def code_with_a_calibration(site: Site, server: SGLangProcess, prompt: list[int]) -> None:
    """Has a server code a prompt, and restore it."""
    words, _ = generate(server, prompt)
    assert server.client.wait_published()
    headers = [page.header for page in site.engine.pages if page.header.calibration_digest]
    assert len(headers) >= STORED_PAGES
    assert {header.profile_name for header in headers} == {"high"}
    forget(server)
    found, stored = generate(server, prompt)
    assert stored == STORED_PAGES * PAGE_TOKENS
    assert len(found) == len(words)
    assert metric(server, "kvcodec_restore_failures_total") == 0


def test_a_server_calibrates_latents_itself(new_site):
    site = new_site("latent")
    server = site.start("auto", profile="high", kvcodec_args=("--kvcodec-auto-calibrate", "true"))
    *prompts, last = drawn_prompts(9)
    for tokens in prompts:
        generate(server, tokens)
        assert server.client.wait_published()
    wait_for(lambda: metric(server, "kvcodec_calibrations_total", outcome="made") == 1, "calibration", 180)
    code_with_a_calibration(site, server, last)
    # Only the end of a latent is rotated.
    assert "K will be coded with its rotation" in server.log_text()


def test_a_model_with_sliding_windows_is_calibrated_by_the_command(new_site, capfd):
    site = new_site("sliding")
    few = ["--documents", "16", "--gradient-documents", "2", "--search-documents", "2", "--threads", "1"]
    few += ["--prefix-tokens", "256", "--continuation-tokens", "64", "--layers-per-block", "1", "--profile", "high"]
    assert main(["calibrate", "--model", site.model, "--remote", site.remote, *few]) == 0
    # The layers with a window turn K with another base than the others.
    assert "K is coded as it is" in capfd.readouterr().out
    server = site.start("calibrated", profile="high")
    assert metric(server, "kvcodec_calibrations_total", outcome="used") == 1
    (tokens,) = drawn_prompts(1)
    code_with_a_calibration(site, server, tokens)


_RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
load_plugins()
for argv in json.loads(sys.argv[1]):
    try:
        args = prepare_server_args(argv)
        args.resolve_once()
        said = "started"
    except SystemExit as exit:
        said = str(exit)
    print("SAID", json.dumps(said))
"""


def test_models_of_which_nothing_can_be_coded_are_refused_before_they_are_loaded(tmp_path):
    import transformers

    common = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "num_attention_heads": 2}
    configs = {
        "recurrent": (transformers.Qwen3NextConfig(**common), "state-space or linear-attention layers"),
        "state": (transformers.FalconH1Config(**common), "state-space or linear-attention layers"),
        "shapes": (
            transformers.MiMoV2FlashConfig(**common, hybrid_layer_pattern=[1, 0]),
            "KV of another shape than its other layers",
        ),
    }
    architectures = {
        "recurrent": "Qwen3NextForCausalLM",
        "state": "FalconH1ForCausalLM",
        "shapes": "MiMoV2FlashForCausalLM",
    }
    cases = []
    for name, (config, _) in configs.items():
        config.architectures = [architectures[name]]
        config.save_pretrained(tmp_path / name)
        asked = ["--enable-kvcodec", "--kvcodec-remote", "grpc://127.0.0.1:1"]
        cases.append(["--model-path", str(tmp_path / name), "--device", "cpu", *asked])
    ran = subprocess.run(
        [sys.executable, "-c", _RESOLVE, json.dumps(cases)],
        env={**os.environ, **CPU_ENV},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = [json.loads(line.removeprefix("SAID ")) for line in ran.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == len(cases)
    for (_, words), sentence in zip(configs.values(), said, strict=True):
        assert sentence.startswith("sglang-kvcodec: kvcodec can't code a model")
        assert words in sentence
        assert "\n" not in sentence
