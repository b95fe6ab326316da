"""HIP-NN potentials inside LAMMPS.

Importing this package imports nothing heavy: LAMMPS calls its entry point at every start, also
for runs that have nothing to do with it. Names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "HipnnMLIAP": "lammps_interface.mliap",
    "LammpsHalo": "lammps_interface.exchange",
    "export_mliap": "lammps_interface.export",
    "use_object": "lammps_interface.loader",
}

__all__ = ["HipnnMLIAP", "LammpsHalo", "export_mliap", "use_object"]

if TYPE_CHECKING:
    from lammps_interface.exchange import LammpsHalo
    from lammps_interface.export import export_mliap
    from lammps_interface.loader import use_object
    from lammps_interface.mliap import HipnnMLIAP


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lammps_interface' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
