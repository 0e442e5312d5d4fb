"""What is started and stopped when, with stand-ins for the processes."""

import contextlib

import pytest
from latency.fake_sglang import FakeSGLang

from sglang_kvcodec.latency import experiment
from sglang_kvcodec.latency.experiment import Site, methods_of, run_on_own_servers
from sglang_kvcodec.latency.loads import Load
from sglang_kvcodec.latency.sglang_serving import ServingLoad
from sglang_kvcodec.latency.sweep import SweepPlan
from sglang_kvcodec.testing.sglang_client import SGLangClient

LOAD = Load("shared-prefix", 200, answer_tokens=4)


class Progress:
    def begin(self, steps):
        pass

    def step(self, words):
        pass


@pytest.fixture
def told(monkeypatch):
    """What happened, in order."""
    events = []

    class FakeLab(contextlib.ExitStack):
        def __init__(self, model, work_dir, server_args, say):
            super().__init__()
            self.server_args = server_args

        def start_server(self, name, kvcodec, among):
            server = self.enter_context(FakeSGLang(kvcodec=kvcodec is not None))
            server.client = SGLangClient(server.url)
            flags = kvcodec.to_args() if kvcodec else ()
            events.append(("start", name, among, "--kvcodec-trace" in flags, *self.server_args))
            self.callback(events.append, ("stop", name))
            return server

    class FakePeer(contextlib.ExitStack):
        remote = "grpc://127.0.0.1:7440"

        def __init__(self, store_dir, capacity):
            super().__init__()
            self.callback(events.append, ("stop", "peer"))

        def start(self, bandwidth, clients=()):
            events.append((bandwidth, len(clients)))

        def put_calibrations(self, artifacts):
            events.extend(("put", artifact) for artifact in artifacts)

    def fake_serving(load, base_url, name, work_dir):
        events.append(("serving", name))
        return {"median_ttft_ms": 1.0}

    monkeypatch.setattr(experiment, "Lab", FakeLab)
    monkeypatch.setattr(experiment, "ShapedPeer", FakePeer)
    monkeypatch.setattr(experiment, "run_serving", fake_serving)
    return events


def run(tmp_path, groups, serving=None):
    site = Site("m", tmp_path, "1GB", tmp_path / "trace.json", ("--tp", "2"), (b"calibration",))
    plan = SweepPlan(LOAD, ("10Mbps", "unlimited"), repeats=1, settle=0)
    return run_on_own_servers(site, groups, plan, serving, Progress(), lambda words: None)


def test_side_by_side_all_are_up_at_once_and_down_at_the_end(told, tmp_path):
    sweep, _ = run(tmp_path, [methods_of(["exact"], "exact")])
    assert told == [
        ("unlimited", 0),
        ("put", b"calibration"),
        ("start", "prefill", 3, False, "--tp", "2"),
        ("start", "planner", 3, True, "--tp", "2"),
        ("start", "exact", 3, False, "--tp", "2"),
        *(("unlimited", 2), ("10Mbps", 2), ("unlimited", 2)),
        *(("stop", "exact"), ("stop", "planner"), ("stop", "prefill"), ("stop", "peer")),
    ]
    assert {sample.method for sample in sweep.samples} == {"prefill", "device", "planner", "exact"}


def test_one_at_a_time_each_has_the_machine_for_itself(told, tmp_path):
    sweep, _ = run(tmp_path, [[method] for method in methods_of(["exact"], "exact")])
    lifetimes = [event[:2] for event in told if event[0] in ("start", "stop")]
    assert lifetimes == [
        *(("start", "prefill"), ("stop", "prefill"), ("start", "planner"), ("stop", "planner")),
        *(("start", "exact"), ("stop", "exact"), ("stop", "peer")),
    ]
    assert len(sweep.samples) == 2 * 4


def test_sglangs_generator_drives_the_server_without_kvcodec_once_and_the_planner_at_each_bandwidth(told, tmp_path):
    serving = ServingLoad("m", LOAD, 2, 1)
    _, rows = run(tmp_path, [methods_of(["exact"], "exact")], serving)
    assert [(row["method"], row["bandwidth"]) for row in rows] == [
        *(("prefill", None), ("planner", "10Mbps"), ("planner", "unlimited")),
    ]
    first = next(at for at, event in enumerate(told) if event[0] == "serving")
    assert told[first:-4] == [
        ("serving", "serving-prefill"),
        ("serving", "serving-planner-stores"),
        *(("10Mbps", 2), ("serving", "serving-planner-at-10Mbps")),
        *(("unlimited", 2), ("serving", "serving-planner-at-unlimited")),
    ]


def test_a_failure_stops_everything(told, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no luck")

    monkeypatch.setattr(experiment, "run_serving", fails)
    with pytest.raises(RuntimeError, match="no luck"):
        run(tmp_path, [methods_of(["exact"], "exact")], ServingLoad("m", LOAD, 2, 1))
    assert told[-4:] == [("stop", "exact"), ("stop", "planner"), ("stop", "prefill"), ("stop", "peer")]
