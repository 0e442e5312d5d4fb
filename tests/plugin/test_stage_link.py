"""Messages between stages, in processes of their own over gloo."""

import subprocess
import sys

STAGES = 3
_STAGE = """
import queue
import sys
import threading

import torch

from sglang_kvcodec.plugin.stage_link import MOST_REPORTED, StageLink

stage, stages, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=address, rank=stage, world_size=stages)
link = StageLink(torch.distributed.group.WORLD)
assert (link.stage, link.stages) == (stage, stages)
rounds = 300
if stage == 0:
    heard = [queue.SimpleQueue() for _ in range(stages)]
    link.listen(lambda stage, kind, numbers: heard[stage].put((kind, numbers)))
    # The others are behind by far: nothing waits for them, up to a bound.
    for number in range(50):
        link.decide([number, 1 << 50])
    for number in range(rounds):
        for other in range(1, stages):
            kind, numbers = heard[other].get(timeout=60)
            assert kind == number % 3 and numbers == list(range(number % MOST_REPORTED)), (other, number, kind, numbers)
    link.decide([1, 2, 3])
else:
    for number in range(rounds):
        link.report(number % 3, list(range(number % MOST_REPORTED)))
    for number in range(50):
        assert link.decision(2) == [number, 1 << 50]
    assert link.decision(3) == [1, 2, 3]
link.close()
assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kvcodec-stage")]
print("done", flush=True)
"""


def test_reports_come_in_order_and_decisions_reach_all(tmp_path):
    address = f"file://{tmp_path}/meeting"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _STAGE, str(stage), str(STAGES), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for stage in range(STAGES)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert all("done" in each for each in printed), printed
    assert [process.returncode for process in processes] == [0] * STAGES, printed
