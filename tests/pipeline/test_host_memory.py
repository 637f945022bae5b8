"""The allocator's setting does what it is for; in a child, as it lasts as long as its process."""

import subprocess
import sys

MEASURE = """
import resource, sys, torch
from pipeline.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    return torch.ones(16 << 20)  # 64 MB
for _ in range(20):  # until the heap has found its size
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_tensor_takes_the_memory_of_the_one_before():
    faults = [
        int(subprocess.run([sys.executable, "-c", MEASURE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("give back", "keep")
    ]
    assert faults[1] < 100 < 10_000 < faults[0], faults
