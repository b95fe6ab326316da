"""What pair_style mliap/py cannot do is said by an error, not by a number that is wrong."""

import pytest
from lammps_helpers import dump_object, lmp, needs_lammps, write_crystal
from lammps_objects import LJ
from model_helpers import make_model

from lammps_interface import export_mliap
from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import model_bytes
from md_plugin.potential import Potential

pytestmark = needs_lammps

SCRIPT = """
units metal
newton {newton}
read_data atoms.data
mass * 39.95
pair_style mliap unified model.pkl 0
pair_coeff * * Ar Kr
group one id 1:20
group two id 21:40
thermo_style custom step pe
{body}
"""
CASES = {
    "group/group": (
        "compute g one group/group two\nthermo_style custom step c_g\nrun 0",
        "Pair style does not support compute group/group",
    ),
    "pair/local": (
        "compute p all pair/local eng\ncompute m all reduce sum c_p inputs local\n"
        "thermo_style custom step c_m\nrun 0",
        "Pair style does not support compute pair/local",
    ),
    "pair_write": (
        "pair_write 1 2 10 r 2.0 4.0 table.txt ArKr",
        "does not support pair_write",
    ),
    "respa inside the pair style": (
        "fix 1 all nve\nrun_style respa 2 2 inner 1 3.0 4.0 outer 2\nrun 1",
        "Pair style does not support rRESPA inner/middle/outer",
    ),
    "fix adapt": (
        "fix a all adapt 1 pair mliap/py epsilon * * v_x\nvariable x equal 1.0\nrun 0",
        "pair style mliap/py",
    ),
}


def run_body(folder, body, newton="on", ranks=1):
    dump_object(folder, LJ(["Ar", "Kr"], 7.0))
    write_crystal(folder / "atoms.data", (3, 3, 3), 5.3)
    (folder / "in.lmp").write_text(SCRIPT.format(body=body, newton=newton))
    return lmp(folder, ranks)


@pytest.mark.parametrize("case", CASES)
def test_unsupported(tmp_path, case):
    body, text = CASES[case]
    done = run_body(tmp_path, body)
    assert done.returncode != 0, done.stdout
    assert text in done.stdout, done.stdout


@pytest.mark.parametrize("newton", ["off", "off on"])
def test_newton_pair_off(tmp_path, newton):
    done = run_body(tmp_path, "run 0", newton, ranks=2)
    assert done.returncode != 0
    assert "requires newton pair on" in done.stdout


UNITS = ["lj", "si", "cgs", "electron", "micro", "nano"]


@pytest.mark.parametrize("style", UNITS)
def test_units_that_are_refused(style):
    """What `pair_style` says in LAMMPS is asserted for one of them in test_lammps_errors.py."""
    unified = HipnnMLIAP(model_bytes(make_model()))
    with pytest.raises(ValueError, match=f"LAMMPS units '{style}' are not supported"):
        unified.begin_run(style, 0, 1)


def test_units_cannot_change_behind_the_model(tmp_path):
    """`clear` and other units in the same process: the same file, converted anew."""
    export_mliap(Potential(make_model(), dtype="float64"), tmp_path / "model.pt", dtype="float64")
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 3.6, types=3)
    part = (
        "units {}\nread_data atoms.data\nmass * 12\npair_style mliap unified model.pt 0\n"
        "pair_coeff * * H C O\nthermo_style custom step pe\n"
        "thermo_modify norm no format float %.16g\nrun 0\n"
    )
    (tmp_path / "in.lmp").write_text("clear\n".join(map(part.format, ("metal", "real", "metal"))))
    done = lmp(tmp_path)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    found = [float(lines[k + 1].split()[1]) for k, s in enumerate(lines) if "PotEng" in s]
    kcal = 1.602176634e-19 * 6.02214076e23 / 4184  # per eV; exact SI values
    assert found[1] == pytest.approx(kcal * found[0], rel=1e-12)
    assert found[2] == found[0]
