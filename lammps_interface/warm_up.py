"""Warm-up: the code of a step is compiled, or read from the disk, before the first step.

numba and Triton keep compiled code on the disk. Ranks that start together would all compile it; and
numba's index of what is there is written without a lock, so that two processes that compile for
different dtypes at once may end up with each other's code. So one process of a node writes at a
time, and nobody reads while it does. Under mliap/py the first rank of each node comes first and the
others wait for it in LAMMPS's communication (pair_mliap_py.cpp), then read all at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from md_plugin.halo import IndexHalo
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential

APART = 0.8  # cutoffs between neighbours: none is closer than what the model was trained on
SIZES = (4, 4096)  # atoms for one thread, and for several, which have loops of their own


def warm_up(potential: Potential, *, fused: bool, alone: bool) -> None:
    """Evaluates atoms in a line, with a ghost of the first behind the last.

    Args:
        potential: the potential.
        fused: which of its ways: fused layers, or the sums over pairs.
        alone: whether code may have to be compiled, which one process of a node does at a time.
    """
    device = potential.device
    halo = IndexHalo(torch.tensor([0], device=device)) if potential.n_exchanges else None
    with compiled_code(alone):
        for n in SIZES:
            geometry = _line(n, APART * potential.rcut).to(device)
            species = torch.full((n + 1,), potential.species[0], device=device)
            if fused:
                potential.evaluate_geometry(species, geometry, halo=halo)
            else:
                potential.evaluate_pairs(species, geometry.pairs, geometry.r_ij(), halo=halo)


def _line(n: int, apart: float) -> Geometry:
    """Atoms and one ghost; each atom has the next on either side as its neighbours."""
    atom = torch.arange(n, dtype=torch.int32)
    sender = torch.stack([atom - 1, atom + 1], dim=1).ravel()[1:]
    row_ptr = torch.cat([atom[:1], 2 * atom + 1])
    x = torch.zeros(n + 1, 3, dtype=torch.float64)
    x[:, 0] = apart * torch.arange(n + 1)
    return Geometry(x, Pairs(row_ptr, sender, n + 1))


@contextlib.contextmanager
def compiled_code(alone: bool) -> Iterator[None]:
    """This user's compiled code on this node: many processes read it, or one alone writes.

    Waits for the others. Where the file system knows no locks, nobody waits.
    """
    path = Path(tempfile.gettempdir()) / f"md_plugin-compiled-code-{os.getuid()}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
