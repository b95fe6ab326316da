"""NanoDFTCalculator: nanodft behind ASE's interface, for molecular dynamics and optimisation.

Energies in eV, forces in eV/Å, dipole in e Å. A step starts from the density of the last one while
the atomic numbers stay the same; results depend on that history by no more than the tolerances.
Molecules only: periodic directions and stress are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, InputError, SCFError, all_changes
from numpy.typing import NDArray

from md_plugin.nanodft.checks import Settings, check_numbers
from md_plugin.nanodft.molecule import Molecule
from md_plugin.nanodft.scf import ConvergenceError


class NanoDFTCalculator(Calculator):
    """ASE calculator for closed-shell molecules.

    Args:
        warm_start: begin each self-consistent field with the last density.
        atoms: a molecule to attach to.
        **settings: fields of `md_plugin.nanodft.Settings`, such as xc="b3lyp", basis="6-31g",
            grid_level=3, charge=0, device="cpu"; `set` changes them later.

    Raises:
        ValueError: an unknown setting or value. When computing also: bad geometry, and what
            nanodft does not support (`UnsupportedSystem`).
        InputError: when computing: periodic directions, magnetic moments.
        SCFError: when computing: the self-consistent field did not converge.
    """

    implemented_properties = ["energy", "free_energy", "forces", "dipole"]
    default_parameters = {field.name: field.default for field in fields(Settings)}
    discard_results_on_any_change = True

    def __init__(self, *, warm_start: bool = True, atoms: Atoms | None = None, **settings: Any):
        self.warm_start = warm_start
        self._molecule: Molecule | None = None
        self._dm: NDArray[np.float64] | None = None
        super().__init__(atoms=atoms, **settings)

    def set(self, **settings: Any) -> dict[str, Any]:
        """Change fields of `Settings`; returns those that changed."""
        unknown = settings.keys() - self.default_parameters.keys()
        if unknown:
            known = ", ".join(self.default_parameters)
            raise ValueError(f"unknown settings {sorted(unknown)}; known are {known}")
        if "device" in settings:
            settings["device"] = str(settings["device"])
        Settings(**{**self.parameters, **settings})
        changed: dict[str, Any] = super().set(**settings)
        if changed:
            self._molecule = self._dm = None
        return changed

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute energy, forces and dipole; ASE calls this."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        check_isolated(self.atoms)
        numbers = check_numbers(self.atoms.numbers)
        if self._molecule is None or self._molecule.numbers != numbers:
            self._molecule, self._dm = Molecule(numbers, Settings(**self.parameters)), None
        start = self._dm if self.warm_start else None
        try:
            result = self._molecule.evaluate(self.atoms.positions, start)
        except ConvergenceError as error:
            raise SCFError(str(error)) from error
        self._dm = result.dm
        self.results = {
            "energy": result.energy,
            "free_energy": result.energy,
            "forces": result.forces,
            "dipole": result.dipole,
        }


def check_isolated(atoms: Atoms) -> None:
    """Raise InputError for what a closed-shell molecule in free space cannot have."""
    if atoms.pbc.any():
        raise InputError(
            f"nanodft computes molecules, but pbc is {atoms.pbc.tolist()}; set it to False"
        )
    if atoms.get_initial_magnetic_moments().any():
        raise InputError("nanodft computes closed shells, but the atoms have magnetic moments")
