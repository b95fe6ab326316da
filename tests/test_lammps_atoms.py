"""What atoms are told one by one: centroid stress, heat flux, spread of committees."""

import numpy as np
import pytest
import torch
from lammps_helpers import lmp, needs_lammps, write_crystal
from test_lammps_model import SCRIPT, make_potential, read_structure, results

from lammps_interface import export_mliap
from md_plugin.committee import Committee, energy_std, force_std
from md_plugin.potential import Structure

pytestmark = needs_lammps

RCUT = 3.4
HEAT = """
velocity all create 300 1234 loop geom
compute ke all ke/atom
compute cs all centroid/stress/atom NULL virial
compute sc all reduce sum c_cs[*]
compute flux all heat/flux ke ea cs
thermo_style custom step pe pxx pyy pzz pxy pxz pyz c_se c_ss[*] c_sc[*] c_flux[*]
thermo_modify norm no format float %.16g
run 0
write_dump all custom dump.v id vx vy vz modify sort id format float %.16g
"""


def run(folder, potential, ranks, text, dtype="float64", units="metal"):
    export_mliap(potential, folder / "model.pt", dtype=dtype)
    script = SCRIPT.format(units=units, processors="", run=text).replace("../", "")
    (folder / "in.lmp").write_text(script)
    return results(lmp(folder, ranks), folder)


def flux_by_finite_differences(potential, structure, velocities):
    """J_a = sum_i sum_k (x_i - x_k)_a dE_i/dx_k . v_k, nearest images; the box must be twice as
    wide as any atom's energy reaches."""

    def energies(x):
        moved = Structure(structure.species, x, structure.cell, structure.pbc)
        return potential.evaluate(moved, forces=False).atom_energy.numpy()

    x, h, flux = structure.positions, 1e-4, np.zeros(3)
    for k, v in enumerate(velocities):
        speed = np.linalg.norm(v)
        step = np.zeros_like(x)
        step[k] = h * v / speed
        change = speed * (energies(x + step) - energies(x - step)) / (2 * h)
        fractional = (x - x[k]) @ np.linalg.inv(structure.cell)
        flux += change @ ((fractional - np.round(fractional)) @ structure.cell)
    return flux


@pytest.mark.parametrize(
    ("n_interactions", "order", "ranks"), [(1, 0, 1), (1, 2, 4), (2, 0, 4), (2, 1, 1)]
)
def test_heat_flux_is_that_of_a_many_body_potential(tmp_path, n_interactions, order, ranks):
    write_crystal(tmp_path / "atoms.data", (3, 3, 3), 4.7, tilt=(0.4, 0.3, -0.2))
    structure = read_structure(tmp_path / "atoms.data")
    potential = make_potential(n_interactions=n_interactions, order=order, rcut=RCUT)
    thermo, _ = run(tmp_path, potential, ranks, HEAT)
    velocities = np.loadtxt(tmp_path / "dump.v", skiprows=9)[:, 1:4]
    # LAMMPS tells the total and, in the second half, the convective part
    flux = thermo[0, 24:27] - thermo[0, 27:30]
    expected = flux_by_finite_differences(potential, structure, velocities)
    # central differences with 1e-4 Å: truncation and rounding both near 1e-7
    np.testing.assert_allclose(flux, expected, atol=2e-6 * np.abs(expected).max())
    if n_interactions == 2:  # the usual stress/atom, half of each pair to each end, is not enough
        assert (
            np.abs(thermo[0, 15:21] - thermo[0, 9:15]).max() < 1e-9 * np.abs(thermo[0, 9:15]).max()
        )


@pytest.mark.parametrize(("ranks", "units"), [(1, "metal"), (4, "real")])
def test_centroid_stress_sums_to_the_virial(tmp_path, ranks, units):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3, tilt=(1.1, 0.7, -0.6))
    potential = make_potential(n_interactions=3)
    thermo, _ = run(tmp_path, potential, ranks, HEAT, units=units)
    symmetric, nine = thermo[0, 9:15], thermo[0, 15:24]
    scale = np.abs(symmetric).max()
    np.testing.assert_allclose(nine[:6], symmetric, atol=1e-9 * scale)
    np.testing.assert_allclose(nine[6:], symmetric[3:], atol=1e-9 * scale)


def test_centroid_stress_in_mixed_precision(tmp_path):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3)
    found = []
    for dtype in ("float64", "mixed"):
        folder = tmp_path / dtype
        folder.mkdir()
        (folder / "atoms.data").write_text((tmp_path / "atoms.data").read_text())
        thermo, _ = run(folder, make_potential(), 2, HEAT, dtype=dtype)
        found.append(thermo[0, 24:30])
    # float32 moments about distances of up to 10 Å lose two digits of seven
    np.testing.assert_allclose(found[1], found[0], atol=1e-4 * np.abs(found[0]).max())


SPREAD = """
fix dev all pair {every} mliap force_std {flag} energy_std {flag}
variable f atom f_dev[1]
compute most all reduce max f_dev[1]
thermo_style custom step pe pxx pyy pzz pxy pxz pyz c_se c_ss[*] c_most
thermo_modify norm no format float %.16g
run 0
write_dump all custom dump.dev id f_dev[1] f_dev[2] modify sort id format float %.16g
"""


def committee(*layers, order=0):
    members = []
    for seed, n_interactions in enumerate(layers):
        member = make_potential(n_interactions=n_interactions, order=order, seed=20 + seed)
        members.append(member)
    return Committee(members)


@pytest.mark.parametrize(
    ("layers", "ranks", "flag", "units"),
    [((2, 2, 2), 1, 1, "metal"), ((1, 1), 4, 0, "metal"), ((1, 2, 3), 2, 1, "real")],
)
def test_spread_of_a_committee_equals_python(tmp_path, layers, ranks, flag, units):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3, tilt=(1.1, 0.7, -0.6))
    models = committee(*layers)
    text = SPREAD.format(every=1, flag=flag)
    thermo, atoms = run(tmp_path, models, ranks, text, units=units)
    structure = read_structure(tmp_path / "atoms.data")
    each = [member.evaluate(structure) for member in models.members]
    unit = 1.0 if units == "metal" else 1.602176634e-19 * 6.02214076e23 / 4184
    forces = torch.stack([e.forces for e in each])
    deviation = np.loadtxt(tmp_path / "dump.dev", skiprows=9)
    expected = force_std(forces).numpy() * unit
    assert expected.min() > 1e-3  # the members really differ
    np.testing.assert_allclose(deviation[:, 1], expected, rtol=1e-9)
    energies = torch.stack([e.atom_energy for e in each])
    np.testing.assert_allclose(deviation[:, 2], energy_std(energies).numpy() * unit, rtol=1e-9)
    assert thermo[0, 15] == pytest.approx(expected.max(), rel=1e-9)
    np.testing.assert_allclose(atoms[:, 5:8], forces.mean(0).numpy() * unit, atol=1e-9 * unit)
    assert thermo[0, 1] == pytest.approx(float(energies.mean(0).sum()) * unit, rel=1e-9)


def test_a_run_halts_where_the_committee_disagrees(tmp_path):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3)
    text = (
        SPREAD.format(every=1, flag=1).rsplit("run 0", 1)[0]
        + "variable most equal c_most\nfix stop all halt 1 v_most > 1e-6 error hard\nrun 10\n"
    )
    export_mliap(committee(1, 1), tmp_path / "model.pt", dtype="float64")
    script = SCRIPT.format(units="metal", processors="", run=text).replace("../", "")
    (tmp_path / "in.lmp").write_text(script)
    done = lmp(tmp_path, 2)
    assert done.returncode != 0
    assert "Fix halt condition for fix-id stop met on step 1" in done.stdout


def test_a_single_model_has_no_spread(tmp_path):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3)
    export_mliap(make_potential(n_interactions=1), tmp_path / "model.pt", dtype="float64")
    text = SPREAD.format(every=1, flag=1)
    script = SCRIPT.format(units="metal", processors="", run=text).replace("../", "")
    (tmp_path / "in.lmp").write_text(script)
    done = lmp(tmp_path)
    assert done.returncode != 0
    assert "cannot extract force_std_flag" in done.stdout
