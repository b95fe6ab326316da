"""Freed memory stays in the process where it is ours, and nowhere else."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import torch
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    from md_plugin.memory import keep_freed_memory
    assert keep_freed_memory()
def step():
    blocks = [torch.ones(2**21) for _ in range(6)]  # of 8 MiB, all freed at the end
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_step_takes_no_fresh_pages():
    fresh, kept = faults("plain"), faults("keep")
    if fresh < 5000:
        pytest.skip(f"this C library keeps memory by itself, or pages are huge: {fresh} faults")
    # 20 steps of 48 MiB are 245,760 pages of 4 KiB if none is kept.
    assert kept < fresh / 2
