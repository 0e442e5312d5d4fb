"""``kvcodec doctor``: what it says, and when it says no. Its rates are not judged here."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.config import Access, Timeouts
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation import examination
from sglang_kvcodec.evaluation import rates as measures
from sglang_kvcodec.evaluation.break_even import break_even, spec_of_model
from sglang_kvcodec.format.spec import KVSpec
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.local_peer import LocalPeer
from sglang_kvcodec.testing.rehearsal import RehearsalDriver, RehearsalLibrary
from sglang_kvcodec.video import registry
from sglang_kvcodec.video.nvidia import NvidiaFacts

MODEL = pathlib.Path(__file__).parents[1] / "models/tiny-code-lm"
QUICK = ["doctor", "--seconds", "0", "--encoder-processes", "0", "--json"]


@pytest.fixture
def accepted(monkeypatch):
    """As with the right SGLang; asking the real guard takes long."""
    monkeypatch.setattr(measures, "guard_verdict", lambda: ("0.5.23", ""))


@pytest.fixture
def peer():
    engine = MemoryEngine(1 << 28)
    local = LocalPeer(engine)
    yield local, engine
    local.stop()


def findings_of(capsys, *arguments, status=0):
    assert main([*QUICK, *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_a_machine_without_a_gpu(accepted, capsys):
    findings = findings_of(capsys)
    assert findings["would_start"] is True
    assert findings["encode"]["backend"] == "x265"
    assert findings["decode"]["backend"] == "software"
    assert findings["decode"]["bits_per_sample"] == pytest.approx(2, abs=0.5)
    assert findings["restore"]["values_per_s_per_thread"] > 0
    assert findings["pictures"]["width"] % 64 == 0
    assert "break_even" not in findings
    assert "links" not in findings


def test_a_link_is_measured_with_objects_that_differ_in_size(peer):
    local, engine = peer
    link = measures.measure_link(f"grpc://{local.address}", 1.0, Access())
    assert link.measured_bytes > 3 << 20
    assert link.fetch_bits_per_s > 0
    assert engine.stat().objects == 0


def test_model_link_and_prefill_give_a_break_even(accepted, capsys, peer, monkeypatch):
    # A busy machine may need longer to connect than a person would wait.
    monkeypatch.setattr(measures, "_TIMEOUTS", Timeouts(connect_s=60.0, lookup_s=60.0, progress_s=60.0))
    local, engine = peer
    remote = f"grpc://{local.address}"
    findings = findings_of(capsys, "--model", str(MODEL), "--remote", remote, "--prefill-tokens-per-s", "0.001")
    assert findings["break_even"]["values_per_token"] == 6 * 2 * 2 * 128
    assert findings["break_even"]["min_tokens"] is not None, findings["notes"]
    assert findings["break_even"]["min_tokens"] >= 1
    (link,) = findings["links"]
    assert link["fetch_bits_per_s"] > 0
    assert link["round_trip_s"] > 0
    assert engine.stat().objects == 0


def test_text_says_the_same(accepted, capsys):
    assert main([argument for argument in QUICK if argument != "--json"] + ["--model", str(MODEL)]) == 0
    out = capsys.readouterr().out
    assert "SGLang     0.5.23: accepted" in out
    assert "give --remote" in out
    assert out.endswith("a server would start\n")


def test_a_peer_that_is_away_is_no_reason_not_to_start(accepted, capsys):
    findings = findings_of(capsys, "--remote", "grpc://127.0.0.1:1")
    assert any("the peer 127.0.0.1:1 can't be used now" in note for note in findings["notes"])


def test_the_links_to_several_peers_are_measured(accepted, capsys, peer, monkeypatch):
    monkeypatch.setattr(measures, "_TIMEOUTS", Timeouts(connect_s=60.0, lookup_s=60.0, progress_s=60.0))
    address = peer[0].address
    findings = findings_of(capsys, "--remote", f"grpc://{address},127.0.0.1:1")
    assert [link["remote"] for link in findings["links"]] == [f"grpc://{address}"]
    assert any("the peer 127.0.0.1:1 can't be used now" in note for note in findings["notes"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--decoder", "nvdec"], "'nvdec' can't decode pictures here"),
        (["--encoder", "nvenc"], "'nvenc' can't encode pictures here"),
    ],
)
def test_a_backend_that_can_not_be_had_is_a_reason(accepted, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(examination, "_has_driver", lambda: False)
    findings = findings_of(capsys, *arguments, status=1)
    assert any(reason in found for found in findings["reasons"])
    assert findings["would_start"] is False


def test_what_the_guard_says_is_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(measures, "guard_verdict", lambda: ("0.6.0", "this kvcodec works with SGLang 0.5.23"))
    findings = findings_of(capsys, status=1)
    assert findings["reasons"] == ["this kvcodec works with SGLang 0.5.23"]
    assert findings["sglang"]["version"] == "0.6.0"


def test_the_real_guard_is_asked():
    version, against = measures.guard_verdict()
    assert (version and not against) or "SGLang" in against


def test_engines_that_are_there_are_measured(accepted, monkeypatch, capsys):
    facts = NvidiaFacts("a Hopper", "13.0", "2.2.4", "", 2, {}, "no engine", 0)
    for module in (registry, examination):
        monkeypatch.setattr(module, "probe_nvidia", lambda device: facts)
    monkeypatch.setattr(examination, "_has_driver", lambda: True)
    monkeypatch.setattr(registry, "load_library", RehearsalLibrary)
    monkeypatch.setattr(registry, "CudaDriver", RehearsalDriver)
    findings = findings_of(capsys)
    assert findings["decode"]["backend"] == "nvdec"
    assert findings["decode"]["workers"] == 4
    assert findings["decode"]["reserve_bytes"] > 1 << 26
    assert findings["video_engines"] == dataclasses.asdict(facts) | {"device": 0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--page-size", "0"],
        ["--tp-size", "0"],
        ["--bits-per-value", "0"],
        ["--bits-per-value", "9"],
        ["--bits-per-value", "nan"],
        ["--prefill-tokens-per-s", "0"],
        ["--remote", "peer"],
    ],
)
def test_an_argument_without_sense_is_refused(accepted, capsys, arguments):
    assert main([*QUICK, *arguments]) == 2


def test_the_command_needs_no_video_library_until_it_runs():
    code = "import sys; sys.modules['av'] = None; from sglang_kvcodec.cli.main import main; sys.exit(main(['doctor']))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    assert "the doctor needs PyAV" in child.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": 4, "num_hidden_layers": 6}, "does not tell"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ([], "no model's configuration"),
    ],
)
def test_a_model_whose_kv_is_not_told_has_no_break_even(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=words):
        spec_of_model(tmp_path, 64, 1)


@pytest.mark.parametrize(("tp_size", "kv_heads"), [(1, 2), (2, 1), (7, 1)])
def test_a_rank_has_its_share_of_the_heads(tp_size, kv_heads):
    spec = spec_of_model(MODEL, 43, tp_size)
    assert isinstance(spec, KVSpec)
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.page_tokens) == (6, kv_heads, 128, 43)


def test_break_even_by_hand():
    # 1000 values a token, 2 bits each. Decode 1e8 values/s: 1e5 tokens/s. Link 1e8 bit/s: 5e4 tokens/s.
    even = break_even(1000, 2.0, 1e8, 4e8, 1e8, 0.001, 1e4)
    assert even.fetch_tokens_per_s == pytest.approx(5e4)
    assert even.bound_by == "link"
    assert even.codec_beats_raw_below_bits_per_s == pytest.approx(16e8)
    # Two round trips of 1 ms against 1e-4 - 2e-5 s a token.
    assert even.min_tokens == 26
    assert break_even(1000, 2.0, 1e8, 1e7, 1e9, 0.001, 1e3).bound_by == "restore"
    assert break_even(1000, 2.0, 1e8, None, 1e9, 0.001, 1e6).min_tokens is None


@hypothesis.given(
    st.integers(1, 10**6),
    st.floats(0.1, 8),
    st.floats(1e3, 1e12),
    st.floats(1e3, 1e12),
    st.floats(1e-6, 1),
    st.floats(1, 1e6),
)
def test_from_the_break_even_on_fetching_wins(values, bits, decode, link, latency_s, prefill):
    even = break_even(values, bits, decode, None, link, latency_s, prefill)
    if even.min_tokens is None:
        assert even.fetch_tokens_per_s <= prefill
        return

    def fetch_s(tokens):
        return 2 * latency_s + tokens * values * max(bits / link, 1 / decode)

    assert fetch_s(even.min_tokens) <= even.min_tokens / prefill * (1 + 1e-9)
    assert even.min_tokens <= 1 or fetch_s(even.min_tokens - 2) >= (even.min_tokens - 2) / prefill * (1 - 1e-9)
