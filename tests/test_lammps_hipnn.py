"""HIP-NN under LAMMPS's features: after each of them LAMMPS has what Python says of the last step.

All sections of a number of ranks run in one LAMMPS process, one after the other, each after a
`clear`; every section is a test of its own. Python sees the positions, types and box of the final
dump and nothing else.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from lammps_helpers import lmp, needs_lammps, tables, write_crystal
from model_helpers import make_potential

from lammps_interface import export_mliap
from md_plugin.neighbours import Batch, Structure
from md_plugin.pairs import Pairs

pytestmark = needs_lammps

NKTV2P = 1.6021765e6  # bar per eV/Å^3, as LAMMPS writes it for units metal
NUMBERS = {"Ta": 73, "W": 74}
MODEL = {"species": (73, 74), "r_min": 2.0, "reference_energies": (-0.3, -0.45)}
MODELS = {
    "ta": make_potential(rcut=4.6, r_max=4.2, order=1, **MODEL),
    "w": make_potential(rcut=3.9, r_max=3.6, seed=4, n_interactions=3, **MODEL),
}

FRAME = """
clear
log {name}.log
units metal
{head}
read_data {data}.data
mass * 100
{pair}
velocity all create 900 5 loop geom
compute ea all pe/atom
compute sa all stress/atom NULL virial
compute ss all reduce sum c_sa[1] c_sa[2] c_sa[3] c_sa[4] c_sa[5] c_sa[6]
compute pp all pressure NULL virial
thermo_style custom step atoms pe c_pp[*] c_ss[*]
thermo_modify format float %.17g
thermo 3
timestep 0.002
neighbor 0.3 bin
neigh_modify every 1 delay 0 check yes
fix nve all nve
{body}
write_dump all custom {name}.dump id type x y z fx fy fz c_ea modify sort id format float %.17g
"""


def unified(model="ta", elements="Ta W"):
    return f"pair_style mliap unified {model}.pt 0\npair_coeff * * {elements}"


@dataclass(frozen=True)
class Section:
    """A part of the script, and what Python has to add up for it.

    Attributes:
        models: model and the element, or None, of each atom type.
        lj: pairs of types that an lj/cut of cutoff 6 handles beside the models.
        excluded: ids of atoms whose pairs with each other are left out.
    """

    body: str = "run 6"
    head: str = ""
    data: str = "crystal"
    pair: str = field(default_factory=unified)
    models: tuple = (("ta", ("Ta", "W")),)
    lj: tuple = ()
    excluded: tuple = ()


LJ = "lj/cut 6.0"
BOTH = "hybrid mliap unified ta.pt 0 mliap unified w.pt 0"
SECTIONS = {
    "hybrid with NULL": Section(
        pair=f"pair_style hybrid mliap unified ta.pt 0 {LJ}\npair_coeff * * mliap NULL Ta\n"
        "pair_coeff 1 * lj/cut 0.05 2.6",
        models=(("ta", (None, "Ta")),),
        lj=((1, 1), (1, 2)),
    ),
    "two models and a cross term": Section(
        pair=f"pair_style {BOTH} {LJ}\npair_coeff * * mliap 1 Ta NULL\n"
        "pair_coeff * * mliap 2 NULL W\npair_coeff 1 2 lj/cut 0.05 2.6",
        models=(("ta", ("Ta", None)), ("w", (None, "W"))),
        lj=((1, 2),),
    ),
    "overlay of two models and lj/cut": Section(
        pair=f"pair_style hybrid/overlay mliap unified ta.pt 0 mliap unified w.pt 0 {LJ}\n"
        "pair_coeff * * mliap 1 Ta W\npair_coeff * * mliap 2 W Ta\n"
        "pair_coeff * * lj/cut 0.05 2.6",
        models=(("ta", ("Ta", "W")), ("w", ("W", "Ta"))),
        lj=((1, 1), (1, 2), (2, 2)),
    ),
    "strongly tilted, npt tri": Section(
        head="box tilt large",
        data="tilted",
        body="unfix nve\nfix npt all npt temp 900 900 0.1 tri 0 9000 0.5\nrun 6",
    ),
    "fixed and shrink-wrapped": Section(head="boundary f p s", data="slab"),
    "atoms lost": Section(
        head="boundary f f f",
        data="slab",
        body="thermo_modify lost ignore\nset atom 1*4 vz 900\nrun 30",
    ),
    "sorting and map": Section(head="atom_modify sort 1 3.0 map hash", body="run 9"),
    "tiled": Section(head="comm_style tiled", data="slab", body="balance 1.0 rcb\nrun 9"),
    "fix balance and deform": Section(
        data="tilted",
        head="box tilt large",
        body="fix even all balance 2 1.0 shift xyz 5 1.05\n"
        "fix pull all deform 1 x erate 2.0 xy erate 2.0 remap v flip no\nrun 9\nunfix pull\nrun 0",
    ),
    "minimize": Section(body="minimize 0 1e-4 8 40"),
    "box/relax": Section(
        head="box tilt large",
        body="fix box all box/relax tri 0.0 vmax 0.002\nminimize 0 1e-4 8 40",
        data="tilted",
    ),
    "respa": Section(body="run_style respa 2 2 bond 1 pair 2\nrun 6"),
    "exclude group": Section(
        body="group fixed id 5:40\nneigh_modify exclude group fixed fixed\nrun 6",
        excluded=tuple(range(5, 41)),
    ),
    "exclude none": Section(
        body="group fixed id 5:40\nneigh_modify exclude group fixed fixed\nrun 2\n"
        "neigh_modify exclude none\nrun 2"
    ),
    "monte carlo": Section(
        data="slab",
        body="fix mc all gcmc 2 20 4 1 29494 30000.0 -4.0 0.4 overlap_cutoff 2.0 full_energy\n"
        "run 8\nunfix mc\nfix swap all atom/swap 2 4 1234 3000.0 ke no types 1 2\nrun 4",
    ),
    "deposit and evaporate": Section(
        data="slab",
        body="region top block 0 8 0 8 28 30\n"
        "fix in all deposit 4 1 2 777 region top near 2.0 vz -1 -2\nrun 9\nunfix in\n"
        "region low block 0 8 0 8 0 5\nfix out all evaporate 3 4 low 888\nrun 8",
    ),
    "edit": Section(
        body="run 2\ndelete_atoms group all\nrun 0\ncreate_atoms 2 random 20 456 NULL "
        "overlap 2.2 maxtry 200\nreplicate 2 1 1\nchange_box all triclinic xy final 1.5 remap "
        "units box\nrun 2\ngroup g id 1:9\nset group g type 1\n"
        "displace_atoms g random 0.1 0.1 0.1 7\nrun 2"
    ),
    "pair_style again": Section(
        body=f"run 2\npair_style zero 5.0\npair_coeff * *\nrun 1\n{unified('w', 'W Ta')}\nrun 3",
        models=(("w", ("W", "Ta")),),
    ),
    "rerun": Section(
        head="atom_modify sort 0 0",
        body="dump keep all custom 3 traj id type x y z\ndump_modify keep format float %.17g\n"
        "run 6\nundump keep\nunfix nve\nrerun traj first 3 dump x y z",
    ),
}


def file_name(name):
    return "".join(c if c.isalnum() else "_" for c in name)


def read_dump(path):
    """Types, rows of the table, and the structure without species of a LAMMPS dump."""
    lines = path.read_text().splitlines()
    title = lines[4].split()
    bounds = np.array([line.split() for line in lines[5:8]], float)
    tilt = bounds[:, 2] if bounds.shape[1] == 3 else np.zeros(3)
    xy, xz, yz = tilt
    low = bounds[:, 0] - [min(0, xy, xz, xy + xz), min(0, yz), 0]
    high = bounds[:, 1] - [max(0, xy, xz, xy + xz), max(0, yz), 0]
    cell = np.diag(high - low) + np.array([[0, 0, 0], [xy, 0, 0], [xz, yz, 0]])
    rows = np.array([line.split() for line in lines[9:]], float).reshape(-1, 9)
    periodic = np.array([flag == "pp" for flag in title[-3:]])
    return rows, Structure(rows[:, 1].astype(int), rows[:, 2:5] - low, cell, periodic)


def keep_pairs(batch, wanted):
    """The batch with those pairs only."""
    receiver = batch.pairs.receiver[wanted]
    sender, n = batch.pairs.sender[wanted], batch.pairs.n_send
    pairs, order = Pairs.from_edges(receiver, sender, n, n)
    return pairs, batch.r_ij[wanted][order]


def add_model(total, potential, elements, structure, excluded):
    kinds = structure.species
    mine = np.array([elements[k - 1] is not None for k in kinds], bool)
    numbers = np.array([NUMBERS[elements[k - 1]] for k in kinds[mine]], int)
    part = Structure(numbers, structure.positions[mine], structure.cell, structure.pbc)
    batch = Batch.from_structures([part], potential.rcut)
    out = torch.from_numpy(excluded[mine])
    pairs, r_ij = keep_pairs(batch, ~(out[batch.pairs.receiver] & out[batch.pairs.sender_long]))
    found = potential.evaluate_pairs(batch.species, pairs, r_ij)
    total["energy"][mine] += found.atom_energy.numpy()
    total["forces"][mine] += found.forces.numpy()
    total["virial"] += found.virial[0].numpy()


def add_lj(total, allowed, structure, epsilon=0.05, sigma=2.6):
    batch = Batch.from_structures([structure], 6.0)
    kinds = torch.stack(
        [batch.species[batch.pairs.receiver], batch.species[batch.pairs.sender_long]]
    )
    low, high = kinds.amin(0), kinds.amax(0)
    wanted = sum(((low == a) & (high == b)) for a, b in allowed).bool()
    i, j = batch.pairs.receiver[wanted].numpy(), batch.pairs.sender_long[wanted].numpy()
    r = batch.r_ij[wanted].numpy()
    r2 = (r**2).sum(axis=1)
    s6 = sigma**6 / r2**3
    half = 2 * epsilon * s6 * (s6 - 1)
    gradient = (12 * epsilon * s6 * (1 - 2 * s6) / r2)[:, None] * r
    np.add.at(total["energy"], i, half)
    np.add.at(total["forces"], i, gradient)
    np.add.at(total["forces"], j, -gradient)
    total["virial"] -= r.T @ gradient


def expectation(section, rows, structure):
    n = len(rows)
    total = {"energy": np.zeros(n), "forces": np.zeros((n, 3)), "virial": np.zeros((3, 3))}
    excluded = np.isin(rows[:, 0], section.excluded)
    for model, elements in section.models:
        add_model(total, MODELS[model], elements, structure, excluded)
    if section.lj:
        add_lj(total, section.lj, structure)
    return total


@pytest.fixture(scope="module", params=[1, 2])
def run(request, tmp_path_factory):
    """Folder and output of one process with all sections."""
    folder = tmp_path_factory.mktemp("sections")
    write_crystal(folder / "crystal.data", (3, 3, 2), 4.1)
    write_crystal(folder / "tilted.data", (3, 2, 2), 4.1, tilt=(11.0, -10.5, 7.5))
    write_crystal(folder / "slab.data", (3, 3, 2), 4.1, height=32.0)
    for name, potential in MODELS.items():
        export_mliap(potential, folder / f"{name}.pt", dtype="float64")
    keys = ("head", "data", "pair", "body")
    parts = [
        FRAME.format(name=file_name(name), **{key: getattr(section, key) for key in keys})
        for name, section in SECTIONS.items()
    ]
    (folder / "in.lmp").write_text("".join(parts))
    return folder, lmp(folder, request.param)


@pytest.mark.parametrize("name", SECTIONS)
def test_lammps_equals_python(run, name):
    folder, done = run
    path = folder / f"{file_name(name)}.dump"
    assert path.exists(), f"the run ended before this section or in it\n{done.stdout[-2000:]}"
    section = SECTIONS[name]
    rows, structure = read_dump(path)
    expected = expectation(section, rows, structure)
    scale = np.abs(expected["forces"]).max()
    # float64 rounding of some hundred terms, and positions that come back through a periodic box
    np.testing.assert_allclose(rows[:, 5:8], expected["forces"], atol=1e-10 * scale, rtol=0)
    np.testing.assert_allclose(rows[:, 8], expected["energy"], atol=1e-10, rtol=1e-10)
    thermo = tables(path.with_suffix(".log").read_text())[-1][-1]
    assert thermo[1] == len(rows)
    assert thermo[2] == pytest.approx(expected["energy"].sum(), rel=1e-10)
    six = expected["virial"][[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] * NKTV2P
    volume = np.linalg.det(structure.cell)
    accuracy = {"atol": 1e-9 * np.abs(six).max(), "rtol": 0}
    np.testing.assert_allclose(thermo[3:9] * volume, six, **accuracy)
    np.testing.assert_allclose(thermo[9:15], -six, **accuracy)


def test_all_sections_ran(run):
    _, done = run
    assert done.returncode == 0, done.stdout[-2000:]
