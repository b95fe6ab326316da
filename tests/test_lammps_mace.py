"""A MACE ML-IAP object with random weights under pair_style mliap/py equals MACE's ASE calculator.

Runs where mace-torch is installed beside this project; docs/other_models.md says how.
"""

import os

import numpy as np
import pytest
import torch
from lammps_helpers import environment, lmp, needs_lammps, results, write_crystal

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 pickles slices
pytest.importorskip("mace", reason="needs mace-torch: see docs/other_models.md")

pytestmark = needs_lammps

SCRIPT = """
units metal
newton on
{grid}
read_data atoms.data
mass * 60
pair_style mliap unified mace.pt 0
pair_coeff * * Ni Al
compute ea all pe/atom
compute sa all stress/atom NULL virial
thermo_style custom step pe pxx pyy pzz pxy pxz pyz
thermo_modify format float %.16g
velocity all set 0 0 0
timestep 0.001
fix 1 all nve
run 2
write_dump all custom dump.final id type x y z fx fy fz c_ea c_sa[*] &
    modify sort id format float %.16g
"""
NKTV2P = 1.6021765e6  # bar per eV/Å^3, as LAMMPS writes it for units metal


def make_mace(dtype):
    from e3nn import o3
    from mace.modules import ScaleShiftMACE, gate_dict, interaction_classes

    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    try:
        model = ScaleShiftMACE(
            r_max=4.0,
            num_bessel=5,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=2,
            num_elements=2,
            hidden_irreps=o3.Irreps("8x0e + 8x1o"),
            MLP_irreps=o3.Irreps("8x0e"),
            gate=gate_dict["silu"],
            atomic_energies=np.array([-1.0, -2.0]),
            avg_num_neighbors=20.0,
            atomic_numbers=[13, 28],
            correlation=2,
            atomic_inter_scale=30.0,
            atomic_inter_shift=0.1,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def write_mace(folder, dtype):
    from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE

    model = make_mace(dtype)
    torch.save(model, folder / "mace.model")
    torch.save(LAMMPS_MLIAP_MACE(model), folder / "mace.pt")


def by_ase(folder, atoms_table, cell, dtype):
    from ase import Atoms
    from mace.calculators import MACECalculator

    numbers = np.array([28, 13])[atoms_table[:, 1].astype(int) - 1]
    atoms = Atoms(numbers, atoms_table[:, 2:5], cell=cell, pbc=True)
    name = str(dtype).removeprefix("torch.")
    atoms.calc = MACECalculator(str(folder / "mace.model"), device="cpu", default_dtype=name)
    try:
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    finally:
        torch.set_default_dtype(torch.float32)


# float64: rounding of some thousand terms; float32 keeps 7 digits and loses two in the products
@pytest.mark.parametrize(
    ("ranks", "dtype", "tolerance"),
    [
        (1, torch.float64, 1e-9),
        (2, torch.float64, 1e-9),
        (4, torch.float64, 1e-9),
        (2, torch.float32, 1e-4),
    ],
)
def test_mace_equals_its_ase_calculator(tmp_path, ranks, dtype, tolerance):
    write_mace(tmp_path, dtype)
    write_crystal(tmp_path / "atoms.data", (4, 2, 2), 3.6, tilt=(1.0, 0.0, -0.5))
    (tmp_path / "in.lmp").write_text(SCRIPT.format(grid=""))
    env = environment(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1)
    thermo, atoms = results(lmp(tmp_path, ranks, env=env), tmp_path)
    cell = np.array([[14.4, 0, 0], [1.0, 7.2, 0], [0, -0.5, 7.2]])
    energy, forces, stress = by_ase(tmp_path, atoms, cell, dtype)
    assert thermo[-1, 1] == pytest.approx(energy, rel=tolerance)
    scale = np.abs(forces).max()
    assert scale > 0.1  # eV/Å: the network acts
    np.testing.assert_allclose(atoms[:, 5:8], forces, atol=tolerance * scale, rtol=0)
    volume = abs(np.linalg.det(cell))
    six = -(stress * volume)[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] * NKTV2P
    summed = -atoms[:, 9:15].sum(axis=0)
    np.testing.assert_allclose(summed, six, atol=10 * tolerance * np.abs(six).max(), rtol=0)
