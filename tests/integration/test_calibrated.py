"""Calibrated tiers on real servers: what is shared, what is refused, and that ranks agree."""

import array
import contextlib
import json
import urllib.request
import warnings

import pytest
from integration.calibrations import calibrations
from integration.cluster import MODEL, PAGE_TOKENS, forget, metric, wait_for, wait_up

from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.conversation import source_slices
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess

pytestmark = pytest.mark.sglang

ANSWER_TOKENS = 8
CHUNKED = ("--chunked-prefill-size", "256")
"""As the plain server of the cluster has it."""


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

    def __init__(self, work_dir, stack):
        self.engine = KeptPages()
        self._peer = LocalPeer(self.engine)
        self.remote = self._peer.remote
        self._work_dir, self._stack = work_dir, stack
        stack.callback(self._peer.stop)

    def put_calibration(self, digest: bytes, artifact: bytes) -> None:
        with contextlib.closing(GrpcPeer(self.remote)) as client:
            client.put_calibration(digest, artifact)

    def start(self, name, *extra_args, profile="high", kvcodec_args=(), env=None) -> SGLangProcess:
        """Starts a server, without waiting for it."""
        args = KVCodecArgs(self.remote, profile, tuple(kvcodec_args))
        log = self._work_dir / f"{name}.log"
        server = SGLangProcess(name, MODEL, log, args, extra_args=[*CHUNKED, *extra_args], env=env)
        self._stack.callback(server.kill)
        return server


@pytest.fixture
def new_site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda: Site(tmp_path, stack)


def encoded(text: str) -> list[int]:
    return CausalLM.load(MODEL).encode(text).tolist()


def generate(server: SGLangProcess, tokens: list[int]) -> tuple[str, int]:
    """The answer to a prompt, and how many of its tokens came from the peer."""
    body = {"input_ids": tokens, "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER_TOKENS}}
    body["return_cached_tokens_details"] = True
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        reply = json.load(response)
    return reply["text"], (reply["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)


def hashes_of(tokens: list[int]) -> list[bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_storage_hash_str
    key = RadixKey(array.array("q", tokens), None).page_aligned(PAGE_TOKENS)
    return [bytes.fromhex(page) for page in get_storage_hash_str(key, None, page_size=PAGE_TOKENS)]


def serve(server: SGLangProcess) -> None:
    server.wait_ready()
    wait_up(server)


def publish(server: SGLangProcess, site: Site, prompts: list[list[int]]) -> list[str]:
    answers = []
    for tokens in prompts:
        text, stored = generate(server, tokens)
        assert stored == 0
        answers.append(text)
        assert server.client.wait_published()
    wanted = {page for tokens in prompts for page in hashes_of(tokens)}
    wait_for(lambda: wanted <= {page.header.key.page_hash for page in site.engine.pages}, "published pages")
    return answers


def test_one_server_restores_what_another_has_coded_with_a_calibration(cluster, new_site):
    site = new_site()
    (calibration,) = calibrations()
    site.put_calibration(calibration.model_digest, calibration.encoded)
    a, b = site.start("calibrated-a"), site.start("calibrated-b")
    first, second = (encoded(text) for text in source_slices([1800] * 2, "bdb"))
    # The second prompt leaves the first in the middle of its node, which is split; the third goes on behind the first.
    prompts = [first, first[:300] + second, first + second[:200]]
    serve(a)
    serve(b)
    answers = publish(a, site, prompts)
    assert answers == [generate(cluster.plain, tokens)[0] for tokens in prompts]

    positions = {page: PAGE_TOKENS * i for tokens in prompts for i, page in enumerate(hashes_of(tokens))}
    for page in site.engine.pages:
        header = page.header
        assert (header.profile_name, header.calibration_digest) == ("high", calibration.digest)
        # Pages with words of an answer are published, too.
        if header.key.page_hash in positions:
            assert header.first_position == positions.pop(header.key.page_hash)
    assert positions == {}
    assert len({page.header.key.namespace_digest for page in site.engine.pages}) == 1

    for tokens, answer in zip(prompts, answers, strict=True):
        forget(b)
        text, stored = generate(b, tokens)
        assert stored >= (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
        assert text == answer
    assert metric(b, "kvcodec_restore_failures_total") == 0
    for server in (a, b):
        assert metric(server, "kvcodec_calibrations_total", outcome="used") == 1
        assert f"artifact {calibration.digest.hex()[:16]}" in server.log_text()


def corrupt(artifact: bytes) -> bytes:
    return artifact[:-1000]


def of_another_model(artifact: bytes) -> bytes:
    return calibrations(tp_size=2)[0].encoded


def absent(artifact: bytes) -> bytes:
    return b""


UNUSABLE = {"format": corrupt, "foreign_page": of_another_model, "not_stored": absent}


def test_without_a_calibration_to_use_servers_say_so_and_serve(new_site):
    (calibration,) = calibrations()
    servers = {}
    tokens = encoded(source_slices([1500], "cmd")[0])
    for outcome, spoil in UNUSABLE.items():
        site = new_site()
        if artifact := spoil(calibration.encoded):
            site.put_calibration(calibration.model_digest, artifact)
        servers[outcome] = site, site.start(f"without-{outcome}", profile="balanced")
    answers = set()
    for outcome, (site, server) in servers.items():
        serve(server)
        answers.update(publish(server, site, [tokens]))
        assert {page.header.profile_name for page in site.engine.pages} == {"high"}
        assert {page.header.calibration_digest for page in site.engine.pages} == {b""}
        forget(server)
        assert generate(server, tokens)[1] > 0
        assert metric(server, "kvcodec_calibrations_total", outcome=outcome) == 1
        said = [line for line in server.log_text().splitlines() if "runs uncalibrated" in line]
        assert len(said) == 1
        assert (
            f"profile 'balanced' runs uncalibrated, as 'high', because there is no calibration to use ({outcome})"
            in (said[0])
        )
    assert len(answers) == 1


def test_each_rank_has_its_own_calibration(new_site):
    site = new_site()
    for calibration in calibrations(tp_size=2):
        site.put_calibration(calibration.model_digest, calibration.encoded)
    server = site.start("calibrated-tp2", "--tp", "2", env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    tokens = encoded(source_slices([1800], "calendar")[0])
    serve(server)
    (answer,) = publish(server, site, [tokens])
    coded_with = {page.header.calibration_digest for page in site.engine.pages}
    assert coded_with == {calibration.digest for calibration in calibrations(tp_size=2)}
    forget(server)
    text, stored = generate(server, tokens)
    assert stored >= 256
    assert text == answer
    assert metric(server, "kvcodec_calibrations_total", outcome="used") == 2


def test_a_server_makes_its_own_calibration_and_reads_pages_of_both_namespaces(new_site):
    site = new_site()
    auto = ("--kvcodec-auto-calibrate", "true")
    a = site.start("auto-a", kvcodec_args=auto)
    texts = source_slices([2200] * 20, "ast")
    early, late = encoded(texts[0]), encoded(texts[1])
    serve(a)
    generate(a, early)
    # Bases over three layers of 256 values need 4 tokens for each value, and half as many again.
    for text in texts[2:]:
        generate(a, encoded(text))
        assert a.client.wait_published()
    wait_for(lambda: metric(a, "kvcodec_calibrations_total", outcome="made") == 1, "calibration", 180)
    assert metric(a, "kvcodec_calibrations_total", outcome="not_stored") == 1
    with contextlib.closing(GrpcPeer(site.remote)) as client:
        (entry,) = client.list_calibrations()
    generate(a, early + late)
    assert a.client.wait_published()
    hashes = hashes_of(early + late)
    wait_for(lambda: hashes[-1] in {page.header.key.page_hash for page in site.engine.pages}, "the last page")
    by_hash = {page.header.key.page_hash: page.header for page in site.engine.pages}
    own, new = len(hashes_of(early)), len(hashes)
    assert {by_hash[page].calibration_digest for page in hashes[: own - 1]} == {b""}
    assert {by_hash[page].calibration_digest for page in hashes[own:new]} == {entry.digest}

    fresh = site.start("auto-fresh", kvcodec_args=auto)
    serve(fresh)
    assert metric(fresh, "kvcodec_calibrations_total", outcome="used") == 1
    _, stored = generate(fresh, early + late)
    assert stored >= (new - 1) * PAGE_TOKENS
    assert metric(fresh, "kvcodec_restore_failures_total") == 0
