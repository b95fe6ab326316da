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
for _ in range(3):
    torch.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(2**21)  # 8 MiB, 2048 pages, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_step_takes_no_fresh_pages():
    # 50 blocks of 2,048 pages (fewer faults where the kernel gives huge pages).
    assert faults("keep") < 1000
