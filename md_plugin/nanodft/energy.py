"""Energies and forces of molecules: `energy_forces` for one geometry, a batch form for many.

Geometries are in Å, results in eV and eV/Å; see `Molecule`, which does the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, overload

from numpy.typing import ArrayLike
from torch import Tensor

from md_plugin.nanodft.checks import Settings
from md_plugin.nanodft.molecule import Molecule, Result


def energy_forces(
    numbers: ArrayLike,
    positions: ArrayLike | Tensor,
    *,
    dm0: ArrayLike | Tensor | None = None,
    **settings: Any,
) -> Result:
    """Energy, forces and more of a closed-shell molecule.

    Args:
        numbers: (n_atom,) atomic numbers, 1 to 18.
        positions: (n_atom, 3) Å; a tensor must not require a gradient.
        dm0: (n_ao, n_ao) float64 density to start from, e.g. `dm` of a similar geometry; the
            result does not depend on it beyond the tolerances. Default: free atoms.
        **settings: fields of `Settings`: charge=0, xc="b3lyp", basis="6-31g", grid_level=3,
            grid_response=True, device="cpu", backend="auto", conv_tol=1e-10, conv_tol_grad=1e-7,
            max_cycle=60, max_memory_mb=1024.

    Raises:
        ValueError: bad input, each case with its own sentence (see `md_plugin.nanodft.checks`).
        UnsupportedSystem: a ValueError; the input makes sense, but nanodft cannot compute it.
        ConvergenceError: the self-consistent field did not converge.
        BackendError: an explicit backend is absent or unfit for the device.
        MemoryError: the integrals would exceed max_memory_mb; raised before allocating.
    """
    return Molecule(numbers, Settings(**settings)).evaluate(positions, dm0)


@overload
def energy_forces_batch(
    numbers: ArrayLike, positions: Iterable[Any], *, return_exceptions: Literal[False] = False,
    **settings: Any,
) -> list[Result]:  # fmt: skip
    """The first error is raised."""


@overload
def energy_forces_batch(
    numbers: ArrayLike, positions: Iterable[Any], *, return_exceptions: bool, **settings: Any
) -> list[Result | Exception]:
    """Errors stand in the list."""


def energy_forces_batch(
    numbers: ArrayLike,
    positions: Iterable[Any],
    *,
    return_exceptions: bool = False,
    **settings: Any,
) -> list[Any]:
    """`energy_forces` for conformers of one composition, in one pass.

    As many as max_memory_mb holds go through all stages together: on a GPU they cost the launches
    of one. Each starts from free atoms and ends when it has converged: its numbers do not depend on
    the others or on the order, beyond roundings.

    Args:
        numbers: (n_atom,) atomic numbers.
        positions: (n_conformer, n_atom, 3) Å.
        return_exceptions: a conformer that fails has its error in its place of the list, and the
            others have their results; otherwise the first error is raised.
        **settings: fields of `Settings`.

    Raises:
        As `energy_forces`; a note says which conformer it was. What concerns all of them, such as
        settings and numbers, is raised in any case.
    """
    outcomes: list[Result | Exception] = []
    for k, outcome in enumerate(Molecule(numbers, Settings(**settings)).outcomes(positions)):
        if isinstance(outcome, Exception):
            outcome.add_note(f"in conformer {k}")
            if not return_exceptions:
                raise outcome
        outcomes.append(outcome)
    return outcomes
