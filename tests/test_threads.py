"""Thread counts: torch's rules; numba's thread pool must neither exceed nor change it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CODE = """
import json, sys, torch, numba
sys.path.insert(0, sys.argv[1])
from model_helpers import crystal, make_potential
def counts():
    return torch.get_num_threads(), numba.get_num_threads()
found = []
for threads in [None, 2, 1]:
    if threads:
        torch.set_num_threads(threads)
    make_potential(backend="numba", order=1).evaluate(crystal())
    found.append(counts())
print(json.dumps(found))
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_numba_keeps_to_the_threads_of_torch(layer):
    """Two threads on a core that has to be shared cost a factor of 30 (spinning OpenMP threads)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    env |= {"NUMBA_THREADING_LAYER": layer, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(TESTS)], env=env, capture_output=True, text=True
    )
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"numba has no threading layer {layer} here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 1], [2, 2], [1, 1]]
