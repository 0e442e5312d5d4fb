"""What a message leaves behind is there for the next."""

import subprocess
import sys

_COUNT_FAULTS = """
import resource
from sglang_kvcodec.rpc.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        [bytearray(1_000_003) for _ in range(7)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
keep_freed_memory()
faults()
print(faults())
"""


def test_freed_memory_is_not_faulted_in_again():
    # In a process of its own, for it is set for a whole process.
    ran = subprocess.run([sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True)
    # A hundred times 1 715 pages otherwise.
    assert int(ran.stdout) < 1715
