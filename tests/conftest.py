"""Set before anything imports torch, numba or triton.

One thread: the systems are tiny, and on a busy machine a second thread waits longer than it helps.
Without a GPU triton's kernels are interpreted, not skipped. With one, cuBLAS is told to give the
same result every time, without which torch refuses products where that is asked for.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hippynn_experiment import experiment  # noqa: F401
from lammps_real import harness, pytest_terminal_summary, real_lammps  # noqa: F401
