"""What becomes of freed blocks, in a process of their own."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from fourscore.runs.memory import HEAVY, return_freed_memory
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
assert return_freed_memory({weights}) == {expected}
torch.empty(2**22).fill_(0)  # 16 MiB, freed at once: glibc keeps blocks of that size from now on
before = anonymous()
blocks = [torch.ones(2**20) for _ in range(40)]
last = torch.ones(1024)  # above them in the heap, so that its end cannot be cut off
del blocks
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_blocks_go_back() -> None:
    def kept(expected: bool, weights: str = "HEAVY", **env: str) -> float:
        command = [sys.executable, "-c", CODE.format(expected=expected, weights=weights)]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert kept(True) < 8
    assert kept(False, MALLOC_MMAP_THRESHOLD_=str(2**25), MALLOC_TRIM_THRESHOLD_=str(2**31)) > 100
    # A small model is left alone.
    assert kept(False, weights="HEAVY - 1") > 8


KEPT = """
import resource
import torch
from fourscore.runs.memory import HEAVY, give_back, keep_freed_memory
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def a_pass():
    blocks = [torch.ones(2**20) for _ in range(40)]  # 4 MiB each
kept = keep_freed_memory(HEAVY)
before = anonymous()
a_pass()
held = anonymous() - before
start = faults()
a_pass()
again = faults() - start
give_back()
print(kept, held, again, anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_pass_finds_the_memory_of_the_one_before_until_it_is_given_back() -> None:
    def run(**env: str) -> tuple[bool, float, int, float]:
        done = subprocess.run(
            [sys.executable, "-c", KEPT], env=os.environ | env, capture_output=True, text=True, check=True
        )
        kept, held, again, left = done.stdout.split()
        return kept == "True", float(held), int(again), float(left)

    kept, held, again, left = run()
    assert kept and held > 150 and left < 8
    assert again < 12_000  # 160 MiB are 40960 pages; an aligned block does not always fit where one was
    kept, _, again, _ = run(MALLOC_MMAP_THRESHOLD_=str(128 * 1024))
    assert not kept and again > 30_000
