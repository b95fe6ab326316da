"""Ranks under pair_style mliap/py: empty, filling and emptying ones, exchanges, faults, grids."""

import numpy as np
import pytest
from lammps_helpers import LIMIT, dump_object, lmp, lmp_in_turn, needs_lammps, tables, write_crystal
from lammps_objects import Counting, Unloadable
from test_lammps_model import make_potential, read_structure

from lammps_interface import export_mliap
from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import model_bytes
from md_plugin.potential import Structure

pytestmark = needs_lammps

LAYERS = 3
FRAME = """
units metal
newton on
{head}
{box}
mass * 100
pair_style mliap unified {model} 0
pair_coeff * * Ta W
compute ea all pe/atom
compute sa all stress/atom NULL virial
compute ss all reduce sum c_sa[*]
compute pp all pressure NULL virial
thermo_style custom step atoms pe c_pp[*] c_ss[*] vol
thermo_modify norm no lost warn format float %.17g
thermo 1
timestep 0.002
neighbor 0.3 bin
neigh_modify every 1 delay 0 check yes
fix nve all nve
{body}
write_dump all custom dump.end id type x y z fx fy fz c_ea modify sort id format float %.17g
"""
DATA = "read_data atoms.data"
EMPTY = "region b block 0 12 0 12 0 40\ncreate_box 2 b"
ALONE = "create_atoms 1 single 1.0 2.0 31.0"


def write(folder, box=DATA, body="run 3", head="", potential=None, fault=(-1, -1)):
    potential = potential or make_potential(n_interactions=LAYERS)
    inner = HipnnMLIAP(model_bytes(potential.model), dtype="float64")
    dump_object(folder, Counting(inner, fault))
    text = FRAME.format(head=head, box=box, body=body, model="model.pkl")
    (folder / "in.lmp").write_text(text)


def run(folder, ranks, **changes):
    write(folder, **changes)
    return lmp(folder, ranks)


def counts(folder, ranks):
    """(ranks, steps, columns of `Counting`)"""
    return np.stack([np.loadtxt(folder / f"counts.{k}", ndmin=2) for k in range(ranks)])


def assert_same_exchanges(rows):
    """Layers - 1 each way in every step; before the first, the check: one forward, two back."""
    steps, forward, reverse = rows[..., 0], rows[..., 4], rows[..., 5]
    assert (steps == steps[0]).all()
    expected = np.full(steps.shape[1], LAYERS - 1)
    start = np.arange(len(expected)) == 0
    np.testing.assert_array_equal(forward, [expected + 1 * start] * len(rows))
    np.testing.assert_array_equal(reverse, [expected + 2 * start] * len(rows))


def assert_one_table(output, ranks):
    lines = output.splitlines()
    (start,) = (k for k, line in enumerate(lines) if line.startswith(" rank host "))
    assert lines[start].split() == "rank host device backend dtype threads exchange MPI".split()
    rows = [line.split() for line in lines[start + 1 : start + 1 + ranks]]
    assert [int(row[0]) for row in rows] == list(range(ranks))
    assert [(row[2], row[4], row[6]) for row in rows] == [("cpu", "float64", "checked")] * ranks
    assert not lines[start + 1 + ranks].split()[:1] == [str(ranks)]


def final(folder, name="dump.end"):
    return np.loadtxt(folder / name, skiprows=9, ndmin=2)


CASES = {  # box, body, head
    "one_atom_in_vacuum": (f"{EMPTY}\n{ALONE}", "run 3", "boundary f f f"),
    "one_atom_alone_in_a_periodic_box": (f"{EMPTY}\n{ALONE}", "velocity all set 0 0 99\nrun 9", ""),
    "two_atoms_out_of_reach": (f"{EMPTY}\n{ALONE}\ncreate_atoms 2 single 7 8 5", "run 3", ""),
    "no_atoms_in_the_box": (EMPTY, "run 3", ""),
    "atoms_come_and_go": (
        EMPTY,
        f"run 2\n{ALONE}\nrun 2\ncreate_atoms 2 single 3.0 2.0 31.5\nrun 2\n"
        "group all id > 0\ndelete_atoms group all\nrun 2\ncreate_atoms 1 single 5 5 5\nrun 2",
        "atom_modify map yes",
    ),
}


@pytest.fixture(scope="module", params=[1, 4])
def sparse(request, tmp_path_factory):
    """Ranks, folder, process and outputs of all cases."""
    folder, ranks = tmp_path_factory.mktemp("sparse"), request.param
    grid = "processors 1 1 4\n" if ranks == 4 else ""
    for name, (box, body, head) in CASES.items():
        (folder / name).mkdir()
        write(folder / name, box, body, grid + head)
    return ranks, folder, *lmp_in_turn(folder, CASES, ranks)


@pytest.mark.parametrize("case", CASES)
def test_hardly_any_atoms(sparse, case):
    ranks, folder, process, outputs = sparse
    assert process.returncode == 0, process.stdout
    found = tables(outputs[case])
    potential = make_potential(n_interactions=LAYERS)
    assert_same_exchanges(counts(folder / case, ranks))
    assert_one_table(outputs[case], ranks)
    alone = [
        float(potential.evaluate(Structure(np.array([z]), np.zeros((1, 3)))).energy[0])
        for z in (73, 74)
    ]
    expected = {
        "two_atoms_out_of_reach": [sum(alone)],
        "no_atoms_in_the_box": [0.0],
        "atoms_come_and_go": [0.0, alone[0], None, 0.0, alone[0]],
    }.get(case, [alone[0]])
    for table, energy in zip(found, expected, strict=True):
        if energy is not None:
            # isolated atoms: the same few operations in both
            np.testing.assert_allclose(table[:, 2], energy, rtol=1e-13)
            assert not table[:, 3:15].any()
        else:
            assert np.abs(table[0, 2] - sum(alone)) > 1e-3


def test_ranks_lose_and_gain_all_atoms(tmp_path):
    """A slab flies through a tall box: every rank is empty for some time, and full for some."""
    found = []
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        write_crystal(folder / "atoms.data", (2, 2, 1), 4.3, height=48.0)
        grid = "processors 1 1 4\nbalance 1.0 z uniform" if ranks == 4 else ""
        head, _, balance = grid.partition("\n")
        body = f"{balance}\nvelocity all set 0 0 1000\nrun 25"  # 50 Å, once around
        done = run(folder, ranks, body=body, head=head)
        assert done.returncode == 0, done.stdout
        rows = counts(folder, ranks)
        assert_same_exchanges(rows)
        found.append((tables(done.stdout)[-1], final(folder)))
        (thermo,) = tables(done.stdout)
    local = rows[..., 1]
    assert (local.min(axis=1) == 0).all()
    assert (local.max(axis=1) == 16).all()
    assert (local.sum(axis=0) == 16).all()
    (one, atoms), (four, atoms4) = found
    # 25 steps of 16 atoms: rounding grows a hundredfold
    np.testing.assert_allclose(four[:, 2], one[:, 2], rtol=1e-12)
    scale = np.abs(atoms[:, 5:8]).max()
    np.testing.assert_allclose(atoms4[:, 5:8], atoms[:, 5:8], atol=1e-9 * scale)
    total = thermo[:, 1]
    assert (total == 16).all()


@pytest.mark.parametrize(
    ("rank", "step"), [(0, 0), (1, 3), (3, 3)], ids=["first step", "middle", "an empty rank"]
)
def test_a_fault_of_one_rank_ends_all(tmp_path, rank, step):
    """The others wait in the exchange, and must not wait forever."""
    write_crystal(tmp_path / "atoms.data", (2, 2, 1), 4.3, height=48.0)
    done = run(tmp_path, 4, body="run 6", head="processors 1 1 4", fault=(rank, step))
    assert done.returncode != 0
    assert f"ZeroDivisionError: the model has failed in step {step}" in done.stdout
    assert f"ERROR on proc {rank}" in done.stdout
    assert "Loop time" not in done.stdout
    if step:  # a rank without ghosts waits in no exchange, but for the thermo output
        last = [np.loadtxt(tmp_path / f"counts.{k}", ndmin=2)[-1, 0] for k in range(4)]
        assert last[rank] == step - 1 and max(last) <= step


@pytest.mark.parametrize("rank", [0, 2])
def test_a_fault_at_load_ends_all(tmp_path, rank):
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 4.3)
    dump_object(tmp_path, Unloadable(["Ta", "W"], 4.0, rank=rank))
    text = FRAME.format(head="", box=DATA, body="run 1", model="model.pkl")
    (tmp_path / "in.lmp").write_text(text)
    done = lmp(tmp_path, 4)
    assert done.returncode != 0
    assert f"no memory left for rank {rank} of 4" in done.stdout
    assert "Step" not in done.stdout


GRIDS = {
    1: ["1 1 1"],
    2: ["2 1 1", "1 1 2"],
    4: ["2 2 1", "1 1 4"],
    8: ["1 1 8", "2 2 2", "8 1 1"],
}
SECTION = """
run 0
write_dump all custom {tag}.start id type x y z fx fy fz c_ea modify sort id format float %.17g
velocity all create 900 5 loop geom
run 100
write_dump all custom {tag}.end id type x y z fx fy fz c_ea modify sort id format float %.17g
"""


@pytest.fixture(scope="module")
def by_grid(tmp_path_factory):
    """Thermo tables and dumps of every grid, one process for each number of ranks."""
    folder = tmp_path_factory.mktemp("grids")
    # 13 Å cut into 8 slices of 1.5 Å, tilted: ghosts within 4.9 Å come from up to four ranks away
    write_crystal(folder / "atoms.data", (3, 3, 3), 4.1, tilt=(2.0, -1.0, 1.5))
    export_mliap(make_potential(), folder / "model.pt", dtype="float64")
    found = {}
    for ranks, grids in GRIDS.items():
        parts = []
        for grid in grids:
            body = SECTION.format(tag=grid.replace(" ", "x")) + "thermo_modify lost warn"
            text = FRAME.format(head=f"processors {grid}", box=DATA, body=body, model="model.pt")
            parts.append(text.replace("thermo 1\n", "thermo 100\n"))
        (folder / "in.lmp").write_text("clear\n".join(parts))
        done = lmp(folder, ranks, limit=3 * LIMIT)  # 8 ranks wait long on few cores
        assert done.returncode == 0, done.stdout
        thermo = tables(done.stdout)
        builds = [line for line in done.stdout.splitlines() if "Neighbor list builds" in line]
        for k, grid in enumerate(grids):
            tag = grid.replace(" ", "x")
            dumps = [final(folder, f"{tag}.{when}") for when in ("start", "end")]
            found[tag] = thermo[2 * k : 2 * k + 2], dumps, int(builds[2 * k + 1].split()[-1])
    return found


@pytest.mark.parametrize("grid", [g.replace(" ", "x") for n in (2, 4, 8) for g in GRIDS[n]])
def test_grids_agree_with_one_rank(by_grid, grid):
    thermo, dumps, builds = by_grid[grid]
    expected, one, _ = by_grid["1x1x1"]
    assert builds >= 2
    for k in range(2):
        scale = np.abs(one[k][:, 5:8]).max()
        # float64; 100 steps amplify rounding by about 1e3
        np.testing.assert_allclose(dumps[k][:, 5:8], one[k][:, 5:8], atol=1e-9 * scale, rtol=0)
        np.testing.assert_allclose(dumps[k][:, 8], one[k][:, 8], rtol=1e-9)
        np.testing.assert_allclose(thermo[k][-1, 2], expected[k][-1, 2], rtol=1e-10)
        scale = np.abs(expected[k][-1, 3:9]).max()
        np.testing.assert_allclose(thermo[k][-1, 3:9], expected[k][-1, 3:9], atol=1e-9 * scale)


H = 1e-4
PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
NKTV2P = 1.6021765e6  # bar per eV/Å^3, as LAMMPS writes it for units metal


@pytest.mark.parametrize("ranks", [1, 4])
def test_virial_is_the_strain_derivative(tmp_path, ranks):
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 4.3, tilt=(2.1, -1.7, 1.6))
    cell = read_structure(tmp_path / "atoms.data").cell
    body = "run 0\n"
    for a, b in PAIRS:
        for sign in (1, -1):
            strain = np.eye(3)
            strain[b, a] += sign * H  # x_a += strain x_b
            (lx, _, _), (xy, ly, _), (xz, yz, lz) = cell @ strain
            body += (
                f"change_box all x final 0 {lx:.17g} y final 0 {ly:.17g} z final 0 {lz:.17g} "
                f"xy final {xy:.17g} xz final {xz:.17g} yz final {yz:.17g} remap units box\nrun 0\n"
            )
    done = run(tmp_path, ranks, body=body, potential=make_potential(order=1))
    assert done.returncode == 0, done.stdout
    found = tables(done.stdout)
    start, energy = found[0][-1], np.array([table[-1, 2] for table in found[1:]])
    derivative = (energy[0::2] - energy[1::2]) / (2 * H)
    pressure, per_atom, volume = start[3:9], start[9:15], start[15]
    accuracy = {"atol": 1e-6 * np.abs(derivative).max(), "rtol": 0}  # H squared, with a margin
    np.testing.assert_allclose(pressure * volume / NKTV2P, -derivative, **accuracy)
    for table in found:
        row = table[-1]
        scale = np.abs(row[9:15]).max()
        np.testing.assert_allclose(row[9:15], -row[15] * row[3:9], atol=1e-10 * scale, rtol=0)
        p = row[3:6].mean()
        assert row[9:12].sum() == pytest.approx(-3 * row[15] * p, abs=1e-10 * scale)
    assert per_atom.any()
