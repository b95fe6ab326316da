"""HIP-NN in LAMMPS equals HIP-NN in Python: ranks, empty ranks, precision, units, dynamics."""

import numpy as np
import pytest
import torch
from lammps_helpers import lmp, needs_lammps, results, write_crystal

from lammps_interface import export_mliap
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.potential import Potential, Structure

pytestmark = needs_lammps

NKTV2P = 1.6021765e6  # bar per eV/Å^3, as LAMMPS writes it for units metal
# eV to kcal/mol: exact SI values
KCAL = 1.602176634e-19 * 6.02214076e23 / 4184

SCRIPT = """
units {units}
{processors}
newton on
read_data ../atoms.data
mass * 100
pair_style mliap unified model.pt 0
pair_coeff * * Ta W
compute ea all pe/atom
compute sa all stress/atom NULL virial
compute se all reduce sum c_ea
compute ss all reduce sum c_sa[1] c_sa[2] c_sa[3] c_sa[4] c_sa[5] c_sa[6]
thermo_style custom step pe pxx pyy pzz pxy pxz pyz c_se c_ss[*] ke
thermo_modify format float %.16g norm no
thermo 10
{run}
write_dump all custom dump.final id type x y z fx fy fz c_ea c_sa[*] &
    modify sort id format float %.16g
"""


def make_model(rcut=4.6, seed=11, **changes):
    """A float32 network: both precisions mean the same."""
    torch.manual_seed(seed)
    config = {"species": (73, 74), "n_feat": 7, "n_nu": 5, "n_interactions": 2, "n_atom_layers": 1}
    config |= {"r_min": 2.0, "r_max": rcut - 0.4, "reference_energies": (-3.0, -4.5)}
    return Hipnn(HipnnConfig(**config | {"rcut": rcut} | changes))


def make_potential(dtype="float64", **changes):
    return Potential(make_model(**changes), dtype=dtype)


def read_structure(path):
    """The crystal as LAMMPS reads it."""
    text = path.read_text().splitlines()
    sides = [float(line.split()[1]) for line in text if line.endswith("hi")]
    tilt = next((line.split()[:3] for line in text if line.endswith("xy xz yz")), (0, 0, 0))
    xy, xz, yz = map(float, tilt)
    cell = np.array([[sides[0], 0, 0], [xy, sides[1], 0], [xz, yz, sides[2]]])
    rows = np.array([line.split() for line in text[text.index("Atoms") + 2 :]], dtype=float)
    species = np.array([73, 74])[rows[:, 1].astype(int) - 1]
    return Structure(species, rows[:, 2:5], cell, np.array([True] * 3))


def in_lammps(tmp_path, potential, ranks, *, dtype="float64", units="metal", run="run 0", grid=""):
    folder = tmp_path / f"{units}{dtype}{ranks}"
    folder.mkdir()
    export_mliap(potential, folder / "model.pt", dtype=dtype)
    text = SCRIPT.format(units=units, processors=grid, run=run)
    (folder / "in.lmp").write_text(text)
    return results(lmp(folder, ranks), folder)


def assert_same(found, structure, potential, tolerance, energy_unit=1.0):
    thermo, atoms = found
    expected = potential.evaluate(structure)
    volume = np.linalg.det(structure.cell)
    energy = float(expected.energy[0]) * energy_unit
    forces = expected.forces.double().numpy() * energy_unit
    virial = expected.virial[0].double().numpy()
    assert thermo[0, 1] == pytest.approx(energy, rel=tolerance)
    assert thermo[0, 8] == pytest.approx(energy, rel=tolerance)
    scale = np.abs(forces).max()
    np.testing.assert_allclose(atoms[:, 5:8], forces, atol=tolerance * scale, rtol=0)
    per_atom = expected.atom_energy.numpy() * energy_unit
    np.testing.assert_allclose(atoms[:, 8], per_atom, rtol=tolerance)
    six = virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    if energy_unit == 1.0:
        pressure = six / volume * NKTV2P
        np.testing.assert_allclose(
            thermo[0, 2:8], pressure, atol=tolerance * np.abs(pressure).max(), rtol=0
        )
        stress = -six * NKTV2P
        np.testing.assert_allclose(
            thermo[0, 9:15], stress, atol=tolerance * np.abs(stress).max(), rtol=0
        )


@pytest.fixture
def crystal(tmp_path):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3, tilt=(1.1, 0.7, -0.6))
    return read_structure(tmp_path / "atoms.data")


@pytest.fixture
def slab(tmp_path):
    write_crystal(tmp_path / "atoms.data", (2, 2, 1), 4.3, height=60.0)
    return read_structure(tmp_path / "atoms.data")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_two_layers_equal_python(tmp_path, crystal, ranks):
    potential = make_potential()
    assert_same(in_lammps(tmp_path, potential, ranks), crystal, potential, 1e-9)


@pytest.mark.parametrize("n_interactions", [1, 2, 3])
def test_layers_with_empty_ranks(tmp_path, slab, n_interactions):
    potential = make_potential(n_interactions=n_interactions, order=1)
    found = in_lammps(tmp_path, potential, 4, grid="processors 1 1 4")
    assert_same(found, slab, potential, 1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["hop", "widths", "sum"])
def test_other_kinds_equal_python(tmp_path, crystal, kind, ranks):
    """HIP-HOP-NN; exchanges of different widths; a sum of networks, each with its exchanges."""
    if kind == "hop":
        model = make_model(order=3, n_max=4, norm_eps=1e-2)
    elif kind == "widths":
        model = make_model(n_interactions=3, n_feat=(3, 8, 5), n_hidden=4, activation="Tanh")
    else:
        parts = make_model(order=1), make_model(rcut=3.6, seed=12, n_interactions=3, n_feat=9)
        model = HipnnSum(parts)
    potential = Potential(model, dtype="float64")
    assert_same(in_lammps(tmp_path, potential, ranks), crystal, potential, 1e-9)


def test_cell_smaller_than_the_cutoff(tmp_path):
    write_crystal(tmp_path / "atoms.data", (1, 1, 1), 4.1, tilt=(0.3, -0.2, 0.4))
    potential = make_potential(order=2)
    small = read_structure(tmp_path / "atoms.data")
    assert_same(in_lammps(tmp_path, potential, 1), small, potential, 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_single_precision(tmp_path, crystal, dtype):
    exact = make_potential("float64")
    # float32 keeps 7 digits; sums over 30 neighbours and two layers lose one or two
    assert_same(in_lammps(tmp_path, exact, 2, dtype=dtype), crystal, exact, 2e-5)


def test_units_real(tmp_path, crystal):
    potential = make_potential()
    found = in_lammps(tmp_path, potential, 2, units="real")
    assert_same(found, crystal, potential, 1e-9, energy_unit=KCAL)


def test_atoms_too_close_are_told_once(tmp_path, crystal):
    potential = make_potential()
    potential.info["r_closest"] = 4.0
    export_mliap(potential, tmp_path / "model.pt", dtype="float64")
    text = SCRIPT.format(units="metal", processors="", run="run 3").replace("../", "")
    (tmp_path / "in.lmp").write_text(text)
    done = lmp(tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("the closest pair in the training data") == 1
    assert "mliap/py: HipnnMLIAP(Potential(HIP-NN, Ta, W" in done.stdout


def test_atom_virial_is_the_pair_form(tmp_path, crystal):
    potential = make_potential()
    _, atoms = in_lammps(tmp_path, potential, 2)
    from md_plugin.neighbours import Batch

    batch = Batch.from_structures([crystal], potential.rcut)
    found = potential.evaluate_pairs(batch.species, batch.pairs, batch.r_ij)
    virial = found.atom_virial.numpy()
    six = -NKTV2P * virial[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    np.testing.assert_allclose(atoms[:, 9:15], six, atol=1e-9 * np.abs(six).max(), rtol=0)


def test_dynamics_is_the_same_on_one_and_two_ranks_and_conserves_energy(tmp_path, crystal):
    potential = make_potential()
    run = "velocity all create 300 5 loop geom\ntimestep 0.001\nfix 1 all nve\nrun 30"
    one, _ = in_lammps(tmp_path, potential, 1, run=run)
    two, _ = in_lammps(tmp_path, potential, 2, run=run)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-9)
    total = one[:, 1] + one[:, -1]
    assert np.abs(total - total[0]).max() < 1e-3 * one[0, -1]
