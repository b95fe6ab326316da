"""Reference energies and forces of small closed-shell molecules, from density functional theory.

    energy_forces([8, 1, 1], positions, xc="b3lyp", basis="6-31g")

Restricted Hartree-Fock and Kohn-Sham in s and p functions, H to Ar, in PyTorch on CPU and CUDA;
energies in eV, forces in eV/Å. What it is for and how exact it is: docs/nanodft.md. Needs PySCF for
its tables (`pip install 'md-plugin[dft]'`), but not before something is computed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "ConvergenceError": "md_plugin.nanodft.scf",
    "Molecule": "md_plugin.nanodft.molecule",
    "NanoDFTCalculator": "md_plugin.nanodft.calculator",
    "Result": "md_plugin.nanodft.molecule",
    "Settings": "md_plugin.nanodft.checks",
    "UnsupportedSystem": "md_plugin.nanodft.errors",
    "eri": "md_plugin.nanodft.integrals",
    "energy_forces": "md_plugin.nanodft.energy",
    "energy_forces_batch": "md_plugin.nanodft.energy",
    "two_electron_gradient": "md_plugin.nanodft.integrals",
}

__all__ = [
    "ConvergenceError",
    "Molecule",
    "NanoDFTCalculator",
    "Result",
    "Settings",
    "UnsupportedSystem",
    "energy_forces",
    "energy_forces_batch",
    "eri",
    "two_electron_gradient",
]

if TYPE_CHECKING:
    from md_plugin.nanodft.calculator import NanoDFTCalculator
    from md_plugin.nanodft.checks import Settings
    from md_plugin.nanodft.energy import energy_forces, energy_forces_batch
    from md_plugin.nanodft.errors import UnsupportedSystem
    from md_plugin.nanodft.integrals import eri, two_electron_gradient
    from md_plugin.nanodft.molecule import Molecule, Result
    from md_plugin.nanodft.scf import ConvergenceError


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'md_plugin.nanodft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
