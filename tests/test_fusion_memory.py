"""Fused inference keeps nothing per pair: peak memory as a slope between N and 2N atoms."""

import json
import subprocess
import sys

import pytest
from lammps_helpers import environment

# The peak of one evaluation, above what was resident before it (list and positions included).
CODE = """
import ctypes, gc, json, sys
import torch
from pathlib import Path
from ase.build import bulk
from model_helpers import make_potential
from md_plugin.neighbours import NeighbourList

def resident(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(what)[1].split()[0])

settings = json.loads(sys.argv[1])
potential = make_potential("mixed", species=(13,), reference_energies=(), **settings)
found = []
for n in (10, 20, 40):  # the first one compiles and warms up
    atoms = bulk("Al", cubic=True) * (20, 10, n)
    atoms.rattle(0.05, seed=0)
    neighbours = NeighbourList(potential.rcut, 1.0)
    neighbours.update(atoms.positions, atoms.cell[:], atoms.pbc)
    place = neighbours.geometry(atoms.positions, atoms.cell[:])
    species = torch.from_numpy(atoms.numbers)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the list has left
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    result = potential.evaluate_geometry(species, place)
    assert result.sums is not None
    found.append((len(atoms), place.pairs.n_pair, resident("VmHWM:") - before))
print(json.dumps(found))
"""


def slopes(**settings):
    """Bytes per atom between 16,000 and 32,000 atoms, and pairs per atom."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(settings)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    _, (n1, p1, m1), (n2, p2, m2) = json.loads(done.stdout.splitlines()[-1])
    return (m2 - m1) / (n2 - n1), (p2 - p1) / (n2 - n1)


RADIAL = {"n_nu": 20, "r_min": 2.0, "n_atom_layers": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        # Padded positions and forces, energies, one-hot species: 150 B; seen 500 B at most.
        ({"n_interactions": 1, "n_feat": 64}, 2_000),
        # And features, their gradients along the atom and along the pairs, and m, 256 B each.
        ({"n_interactions": 2, "n_feat": 64}, 2_500),
        # And q and dE/dq, 20 x 32 x 4 B each, and nine components of m; seen 7,400 B.
        ({"n_interactions": 2, "n_feat": 32, "order": 2}, 9_000),
    ],
)
def test_bytes_per_atom(settings, bound):
    short, few = slopes(rcut=5.0, r_max=4.5, **settings, **RADIAL)
    long, many = slopes(rcut=6.5, r_max=6.0, **settings, **RADIAL)
    assert many > 1.7 * few
    assert short < bound and long < bound
    # Pair vectors alone would be 24 B per pair, sensitivities 80. Resident pages wander by 500 B
    # per atom, which is 13 B per pair here.
    assert long - short < 20 * (many - few)
