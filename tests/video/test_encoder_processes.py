"""The pool of encoder processes, with real processes."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sglang_kvcodec.errors import CodecError, ConfigurationError, EncoderDiedError
from sglang_kvcodec.testing.picture_codec import PictureCodecContract, noise
from sglang_kvcodec.video import encoder_processes
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
from sglang_kvcodec.video.encoder_worker import NICENESS
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder

LIMIT_S = 60


@pytest.fixture(scope="module")
def shared():
    processes = EncoderProcesses(2)
    yield processes
    processes.close()


@pytest.fixture
def processes():
    pool = EncoderProcesses(1)
    yield pool
    pool.close()


class TestProcessEncoder(PictureCodecContract):
    @pytest.fixture(autouse=True)
    def _pool(self, shared):
        self.pool = shared

    def open_encoder(self):
        return self.pool.encoder()

    def open_decoder(self):
        return SoftwareDecoder()


@pytest.mark.parametrize("uniform_blocks", [False, True])
def test_the_bytes_are_those_of_the_encoder_in_this_process(shared, uniform_blocks):
    encoder, here = shared.encoder(uniform_blocks=uniform_blocks), SoftwareEncoder(uniform_blocks=uniform_blocks)
    # Larger and smaller than what came before.
    for count, width, height in ((1, 192, 192), (7, 256, 192), (2, 192, 192)):
        canvases = noise(count, width, height, 5.0, seed=count)
        assert encoder.encode(canvases) == here.encode(canvases)


def test_canvases_that_are_no_block_of_memory(shared):
    canvases = noise(6, 256, 192, 5.0)[::2]
    assert shared.encoder().encode(canvases) == SoftwareEncoder().encode(canvases.copy())


def test_a_canvas_no_encoder_takes_is_a_codec_error_and_costs_no_process(shared):
    before = shared.process_ids
    with pytest.raises(CodecError, match="libx265"):
        shared.encoder().encode(np.zeros((1, 3, 1), np.uint8))
    assert shared.process_ids == before
    shared.encoder().encode(noise(1, 192, 192, 3.0))


def test_workers_are_nice_and_hold_neither_torch_nor_sglang(processes):
    (pid,) = processes.process_ids
    processes.encoder().encode(noise(1, 192, 192, 3.0))
    assert os.getpriority(os.PRIO_PROCESS, pid) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    mapped = pathlib.Path(f"/proc/{pid}/maps").read_text()
    assert "libx265" in mapped
    assert "torch" not in mapped
    code = (
        "import sys, sglang_kvcodec.video.encoder_worker;"
        "print([n for n in sys.modules if n.split('.')[0] in ('torch', 'sglang', 'triton', 'grpc')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_workers_leave_the_metrics_of_the_server_alone(tmp_path):
    """A gauge of theirs would be the least of all that SGLang collects: ``kvcodec_peer_up`` would be 0 for ever."""
    code = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from sglang_kvcodec import metrics
from sglang_kvcodec.testing.picture_codec import noise
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
metrics.PEER_UP.set(1)
processes = EncoderProcesses(2)
processes.encoder().encode(noise(1, 192, 192, 3.0))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(registry.get_sample_value("kvcodec_peer_up"))
processes.close()
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout == "1.0\n"


def test_a_worker_killed_amid_a_picture_is_an_error_and_is_replaced(processes):
    (pid,) = processes.process_ids
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        os.kill(pid, signal.SIGSTOP)  # so that it is at work for as long as it takes to kill it
        work = executor.submit(processes.encoder().encode, noise(2, 192, 192, 3.0))
        while not processes._idle.empty():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EncoderDiedError, match=f"{pid} ended with SIGKILL"):
            work.result(LIMIT_S)
    canvases = noise(3, 256, 192, 5.0)
    assert processes.encoder().encode(canvases) == SoftwareEncoder().encode(canvases)
    assert pid not in processes.process_ids
    assert len(processes.process_ids) == 1
    assert is_gone(pid)


def test_a_worker_killed_while_idle_costs_nothing(processes):
    (pid,) = processes.process_ids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: processes._workers[0]._process.poll() is not None)
    canvases = noise(1, 192, 192, 5.0)
    assert processes.encoder().encode(canvases) == SoftwareEncoder().encode(canvases)


def test_a_worker_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(encoder_processes, "ENCODE_TIMEOUT_S", 0.2)
    processes = EncoderProcesses(1)
    (pid,) = processes.process_ids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EncoderDiedError, match="hung"):
        processes.encoder().encode(noise(1, 192, 192, 3.0))
    assert is_gone(pid)
    processes.close()


def test_no_worker_outlives_the_close_even_with_work_under_way():
    processes = EncoderProcesses(2)
    pids = processes.process_ids
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        started = threading.Semaphore(0)

        def work():
            started.release()
            while True:
                processes.encoder().encode(noise(20, 192, 192, 30.0))

        futures = [executor.submit(work) for _ in range(4)]
        for _ in futures:
            started.acquire()
        processes.close()
        for future in futures:
            with pytest.raises(EncoderDiedError):
                future.result(LIMIT_S)
    assert all(is_gone(pid) for pid in pids)
    assert processes.process_ids == []
    processes.close()


def test_ends_at_once_close_each_descriptor_once(monkeypatch):
    """Closed twice, its number may be that of a file that another thread has opened in between."""
    processes = EncoderProcesses(1)
    (worker,) = processes._workers
    closed = []
    close = os.close

    def close_slowly(descriptor):
        close(descriptor)
        closed.append(descriptor)
        time.sleep(0.05)

    monkeypatch.setattr(os, "close", close_slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for ended in [executor.submit(worker.end) for _ in range(4)]:
            ended.result(LIMIT_S)
    assert closed.count(worker._memory_fd) == 1
    processes.close()


def test_a_worker_at_work_keeps_its_descriptors_until_it_has_been_told(monkeypatch):
    processes = EncoderProcesses(1)
    (worker,) = processes._workers
    is_putting, go_on = threading.Event(), threading.Event()
    put = worker._put

    def put_late(canvases):
        is_putting.set()
        assert go_on.wait(LIMIT_S)
        return put(canvases)

    monkeypatch.setattr(worker, "_put", put_late)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        work = executor.submit(processes.encoder().encode, noise(1, 192, 192, 3.0))
        assert is_putting.wait(LIMIT_S)
        closing = executor.submit(processes.close)
        wait_until(lambda: worker._process.poll() is not None)
        time.sleep(0.1)
        os.fstat(worker._memory_fd)
        assert not closing.done()
        go_on.set()
        closing.result(LIMIT_S)
        with pytest.raises(EncoderDiedError, match="ended with"):
            work.result(LIMIT_S)
    with pytest.raises(EncoderDiedError, match="closed"):
        processes.encoder().encode(noise(1, 192, 192, 3.0))


@pytest.mark.parametrize("is_working", [False, True])
def test_workers_end_when_their_parent_is_killed(is_working):
    code = f"""
import numpy as np, sys, threading
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
processes = EncoderProcesses(2)
if {is_working}:
    canvases = np.random.default_rng(0).integers(0, 256, (3000, 288, 192), dtype=np.uint8)
    for _ in range(2):
        threading.Thread(target=processes.encoder().encode, args=(canvases,)).start()
print(*processes.process_ids, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_a_pool_that_can_not_start_refuses_with_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigurationError, match=r"an encoder process does not start: .* ended with status 1"):
        EncoderProcesses(2)


def test_a_worker_that_can_not_be_replaced_is_an_error_each_time(processes, monkeypatch):
    (pid,) = processes.process_ids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: processes._workers[0]._process.poll() is not None)
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        for _ in range(3):
            with pytest.raises(EncoderDiedError, match="status 1"):
                processes.encoder().encode(noise(1, 192, 192, 3.0))
    processes.encoder().encode(noise(1, 192, 192, 3.0))


def is_gone(pid):
    """Ended; one that nobody has waited for yet counts as gone too."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition):
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
