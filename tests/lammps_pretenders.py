"""A `lmp` that only pretends, and a model that is wrong on purpose; for validate and doctor."""

from pathlib import Path

from lammps_interface.mliap import HipnnMLIAP

INFO = """LAMMPS ({version})
LAMMPS version: {version} / 1

KOKKOS package API: {kokkos}

Installed packages:

{packages}

Info-Info-Info-Info-Info-Info-Info-Info-Info-Info-Info

Communication information:
MPI library level: MPI v3.1
MPI version: {mpi}

Pair styles:

lj/cut  {styles}

Info-Info-Info-Info-Info-Info-Info-Info-Info-Info-Info
"""
OWN = {"version": "4 Jul 2026", "packages": "ML-IAP PYTHON", "styles": "mliap", "kokkos": ""}


def write_program(path, lines):
    """An executable shell script."""
    path = Path(path)
    path.write_text("#!/bin/sh\n" + lines + "\n")
    path.chmod(0o755)
    return path


def write_lmp(path, action="exit 0", mpi="MPICH Version: 4.3", info=INFO, **changes):
    """A `lmp` that describes itself, and does `action` with other scripts."""
    text = info.format(**(OWN | {"mpi": mpi} | changes))
    return write_program(
        path, f"case \"$*\" in *in.info*) /bin/cat <<'END'\n{text}\nEND\nexit 0;; esac\n{action}"
    )


class ScaledForces(HipnnMLIAP):
    """Forces that are off by 0.1 per cent."""

    def compute_forces(self, data):
        super().compute_forces(data)
        data.f[:] = 1.001 * data.f
