"""Memory of LAMMPS with a two-layer model grows linearly: so many bytes per atom and per pair.

Plain ML-IAP keeps a table of atoms times pairs, 40 GB for 2,048 atoms; this must never come back.
"""

import re
import sys

import numpy as np
from lammps_helpers import BIN, environment, launch, needs_lammps
from model_helpers import make_potential

from lammps_interface import export_mliap

pytestmark = needs_lammps

SCRIPT = """
units metal
lattice fcc {constant}
region box block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}
create_box 1 box
create_atoms 1 box
mass 1 27
pair_style mliap unified model.pt 0
pair_coeff * * Al
velocity all create 600 5
neighbor 1.0 bin
fix 1 all nve
run 2
"""
# the largest resident set among the processes that this one has started and waited for
PEAK = (
    "import resource, subprocess, sys\ncode = subprocess.run(sys.argv[1:]).returncode\n"
    "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024\n"
    "print('peak', peak)\nsys.exit(code)"
)


def measure(folder, cells, constant=4.05):
    """Atoms, pairs with skin, and peak resident memory in bytes."""
    (folder / "in.lmp").write_text(SCRIPT.format(cells=cells, constant=constant))
    command = [BIN / "lmp", "-log", "none", "-sf", "py", "-in", "in.lmp"]
    done = launch([sys.executable, "-c", PEAK, *command], folder, env=environment(), limit=300.0)
    assert done.returncode == 0, done.stdout
    patterns = (r"Nlocal: +(\d+)", r"FullNghs: +(\S+)", r"peak (\d+)")
    return [float(re.search(pattern, done.stdout).group(1)) for pattern in patterns]


# Measured with 1,000 to 32,000 atoms, 54 and 86 pairs (skin included) of each: 800 to 1,050 bytes
# per pair, all in all. Autograd keeps about eight rows of n_nu float32 numbers for each pair inside
# the cutoff; an atom has n_nu n_feat numbers in either layer. Freed blocks of the heap come on top.
PER_PAIR, PER_ATOM = 1500, 10_000


def test_memory_is_linear_in_atoms_and_pairs(tmp_path):
    model = {"species": (13,), "reference_energies": (-1.0,), "n_feat": 20, "n_nu": 16}
    model |= {"rcut": 5.0, "r_min": 2.0, "r_max": 4.5}
    export_mliap(make_potential(**model), tmp_path / "model.pt")
    start = measure(tmp_path, (5, 5, 10))  # what Python, torch and a small system take
    for cells in [(10, 10, 10), (20, 10, 10), (20, 20, 10)]:  # 4,000, 8,000 and 16,000 atoms
        atoms, pairs, peak = np.subtract(measure(tmp_path, cells), start)
        assert peak < PER_PAIR * pairs + PER_ATOM * atoms, (cells, atoms, pairs, peak)
    table = 4 * 16_000 * pairs  # of atoms times pairs, the fault of others: 50 GB
    assert peak < table / 20
