"""LAMMPS's own numerical derivatives of LAMMPS's energies, and a fault on the way back of features.

`fix numdiff` moves every atom and `fix numdiff/virial` strains the box, on all ranks, and both know
nothing of the model.
"""

import numpy as np
import pytest
from lammps_helpers import dump_object, lmp, needs_lammps, tables, write_crystal
from lammps_objects import Breaking
from test_lammps_model import make_potential

from lammps_interface import export_mliap
from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import model_bytes

pytestmark = needs_lammps

SCRIPT = """
units metal
atom_modify map yes
read_data atoms.data
mass * 100
pair_style mliap unified model.pt 0
pair_coeff * * Ta W
neighbor 1.0 bin
{body}
"""
NUMDIFF = """
fix forces all numdiff 1 1e-4
fix stress all numdiff/virial 1 1e-4
compute pp all pressure NULL virial
thermo_style custom step c_pp[*] f_stress[*]
thermo_modify format float %.17g
run 0
write_dump all custom end id fx fy fz f_forces[*] modify sort id format float %.17g
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_forces_and_virial_are_lammps_own_derivatives(tmp_path, ranks):
    write_crystal(tmp_path / "atoms.data", (2, 2, 1), 4.3, tilt=(2.3, -1.1, 1.7))
    export_mliap(make_potential(order=1), tmp_path / "model.pt", dtype="float64")
    (tmp_path / "in.lmp").write_text(SCRIPT.format(body=NUMDIFF))
    done = lmp(tmp_path, ranks)
    assert done.returncode == 0, done.stdout
    table = np.loadtxt(tmp_path / "end", skiprows=9)
    # the error of a central difference is of order 1e-4 squared, times third derivatives
    scale = np.abs(table[:, 1:4]).max()
    np.testing.assert_allclose(table[:, 4:7], table[:, 1:4], atol=1e-6 * scale, rtol=0)
    row = tables(done.stdout)[0][0]
    pressure, numerical = row[1:7], row[7:13]
    order = [0, 1, 2, 5, 4, 3]  # numdiff/virial: xx yy zz yz xz xy
    scale = np.abs(pressure).max()
    np.testing.assert_allclose(numerical[order], pressure, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fault_in_the_way_back_ends_all(tmp_path, ranks):
    """One rank fails between its two exchanges of a step while the others wait in the second."""
    write_crystal(tmp_path / "atoms.data", (4, 2, 2), 4.3)
    inner = HipnnMLIAP(model_bytes(make_potential().model), dtype="float64")
    dump_object(tmp_path, Breaking(inner, (ranks - 1, 3)), "model.pkl")
    text = SCRIPT.replace("model.pt", "model.pkl").format(body="fix 1 all nve\nthermo 1\nrun 9")
    (tmp_path / "in.lmp").write_text(text)
    done = lmp(tmp_path, ranks)
    assert done.returncode != 0
    assert "ArithmeticError: the way back is broken in step 3" in done.stdout
    assert f"ERROR on proc {ranks - 1}" in done.stdout
    assert "Loop time" not in done.stdout
