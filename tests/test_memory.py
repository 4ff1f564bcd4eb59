"""Freed blocks go back to the system, in a process of their own."""

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
