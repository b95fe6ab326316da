"""LAMMPS's own example of mliap unified, a Lennard-Jones melt, gives the numbers of its log.

The setting and the numbers are those of examples/mliap/in.mliap.unified.lj.Ar and of its logs of
23 Sep 2022; those of one and of four processes are the same.
"""

import numpy as np
import pytest
from lammps_helpers import dump_object, lmp, needs_lammps, tables

pytestmark = needs_lammps

SCRIPT = """
units lj
lattice fcc 0.8442
region cube block 0 10 0 10 0 10
create_box 1 cube
create_atoms 1 box
mass 1 1.0
velocity all create 3.0 87287 loop geom
pair_style mliap unified mliap_unified_lj_Ar.pkl 0
pair_coeff * * Ar
neighbor 0.3 bin
neigh_modify every 20 delay 0 check no
fix 1 all nve
thermo 50
run 250
"""
# Step Temp E_pair E_mol TotEng Press
LOG = np.array(
    [
        [0, 3, -6.7733681, 0, -2.2744931, -3.7033504],
        [50, 1.6842865, -4.8082494, 0, -2.2824513, 5.5666131],
        [100, 1.6712577, -4.7875609, 0, -2.281301, 5.6613913],
        [150, 1.6444751, -4.7471034, 0, -2.2810074, 5.8614211],
        [200, 1.6471542, -4.7509053, 0, -2.2807916, 5.8805431],
        [250, 1.6645597, -4.7774327, 0, -2.2812174, 5.7526089],
    ]
)


@pytest.mark.parametrize("ranks", [1, 4])
def test_unified_lj_example(tmp_path, ranks):
    lj = pytest.importorskip("lammps.mliap.mliap_unified_lj")
    dump_object(tmp_path, lj.MLIAPUnifiedLJ(["Ar"]), "mliap_unified_lj_Ar.pkl")
    (tmp_path / "in.lmp").write_text(SCRIPT)
    done = lmp(tmp_path, ranks, limit=300.0)
    assert done.returncode == 0, done.stdout
    found = tables(done.stdout)[0]
    # every printed digit
    np.testing.assert_array_equal(found, LOG)
    assert "Total # of neighbors = 303576" in done.stdout
