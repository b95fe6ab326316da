"""HipnnCalculator: the ASE door. Translates, reuses the neighbour list, nothing else.

On a GPU the list is found and kept there: a step sends positions, and gets the results at once.

Energies in eV, forces in eV/Å, stress in eV/Å^3 (Voigt xx, yy, zz, yz, xz, xy; ASE's sign).
Stress needs three periodic directions. `stresses` are per-atom virials, half of each pair to each
of its atoms, over the cell volume: they sum to `stress` (ASE's EMT sums them the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from md_plugin.checkpoint import load_model
from md_plugin.committee import energy_std, force_std
from md_plugin.device_neighbours import DeviceList
from md_plugin.evaluation import Evaluation
from md_plugin.neighbours import NeighbourList
from md_plugin.potential import Potential

PER_ATOM = frozenset({"energies", "forces", "stresses", "energies_std", "forces_std"})


class HipnnCalculator(Calculator):
    """ASE calculator for HIP-NN potentials.

    Args:
        model: path of a `.hipnn` file, name of a bundled model ("ta"), or a loaded `Potential`
            (then device, dtype and backend are those of the potential). A list of these is a
            committee: its means are the results, and its spread is in `results["energies_std"]`
            and `results["forces_std"]`, (n_atoms,), see `md_plugin.committee`.
        device: "auto" takes CUDA if there is one.
        dtype: "mixed" (float64 geometry and sums, float32 network), "float64", "float32", or "fast"
            (as "mixed", sums over neighbours with float16 operands, on a GPU with triton only).
        backend: kernels; None and "auto" choose by themselves.
        skin: extra distance in the neighbour list, Å; the list is reused while it is provably
            complete. 0 rebuilds at every change.

    Raises:
        CheckpointError: the model file is missing, damaged or too new.
        ValueError: an element that the model does not know, positions that are not finite, atoms
            at the same place.
    """

    implemented_properties = [
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
        "stresses",
    ]

    def __init__(
        self,
        model: str | Path | Potential | Sequence[str | Path | Potential],
        *,
        device: str | torch.device = "auto",
        dtype: str = "mixed",
        backend: str | None = None,
        skin: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not skin >= 0:
            raise ValueError(f"skin must not be negative, got {skin} Å")
        self.potential = load_model(model, device=device, dtype=dtype, backend=backend)
        self.neighbours = neighbour_list(self.potential.rcut, skin, self.potential.device)
        self._species = np.zeros(0, dtype=np.int64)
        self._species_there = torch.zeros(0, dtype=torch.int64)  # on the device, in list order

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute the asked properties and all that come with them; ASE calls this."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        atoms = self.atoms
        periodic = bool(atoms.pbc.all())
        if not periodic and {"stress", "stresses"} & set(properties):
            raise PropertyNotImplementedError(
                f"stress needs three periodic directions, but pbc is {atoms.pbc.tolist()}"
            )
        result = self._evaluate(atoms, properties)
        self.results = {
            "energy": float(result.energy),
            "free_energy": float(result.energy),
            "energies": result.atom_energy.cpu().numpy(),
        }
        if result.forces is not None and result.virial is not None:
            self.results["forces"] = result.forces.double().cpu().numpy()
            if periodic:
                virial = result.virial[0].double().cpu().numpy()
                # Symmetric by rotational invariance; the mean removes the rounding.
                stress = -0.5 * (virial + virial.T) / atoms.cell.volume
                self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        if result.members:
            self.results |= _spread(result)
        if "stresses" in properties:
            assert result.atom_virial is not None
            virials = result.atom_virial.double()
            virials = 0.5 * (virials + virials.transpose(1, 2))
            stresses = -virials.cpu().numpy() / atoms.cell.volume
            self.results["stresses"] = full_3x3_to_voigt_6_stress(stresses)
        self._put_in_place()

    def _evaluate(self, atoms: Atoms, properties: Sequence[str]) -> Evaluation:
        potential = self.potential
        others = not np.array_equal(atoms.numbers, self._species)
        if others:
            potential.check_species(atoms.numbers)
            self._species = atoms.numbers.copy()
        positions = np.ascontiguousarray(atoms.positions, dtype=np.float64)
        built = self.neighbours.update(positions, atoms.cell[:], atoms.pbc)
        order = self.neighbours.order
        if others or built:
            species = self._species if order is None else self._species[order]
            self._species_there = torch.as_tensor(species, device=potential.device)
        result = potential.evaluate_geometry(
            self._species_there,
            self.neighbours.geometry(positions, atoms.cell[:]),
            forces=bool({"forces", "stress", "stresses"} & set(properties)),
            per_atom="stresses" in properties,
            results_on=torch.device("cpu"),
        )
        _check_finite(result, order)
        return result

    def _put_in_place(self) -> None:
        """What belongs to atoms: from the order of the neighbour list to that of `atoms`."""
        order = self.neighbours.order
        if order is None:
            return
        for name in PER_ATOM & self.results.keys():
            found = self.results[name]
            placed = np.empty_like(found)
            placed[order] = found
            self.results[name] = placed

    def __repr__(self) -> str:
        return f"HipnnCalculator({self.potential!r}, skin={self.neighbours.skin})"


def neighbour_list(rcut: float, skin: float, device: torch.device) -> NeighbourList:
    """The list for a potential on that device: vesin's search for a CPU, cells on a GPU."""
    if device.type == "cpu":
        return NeighbourList(rcut, skin, ordered=True)
    return DeviceList(rcut, skin, device, ordered=True)


def _spread(result: Evaluation) -> dict[str, np.ndarray]:
    """How far the members of a committee are apart, (n_atoms,) each, eV and eV/Å."""
    energies = torch.stack([member.atom_energy for member in result.members])
    spread = {"energies_std": energy_std(energies).cpu().numpy()}
    forces = [member.forces for member in result.members if member.forces is not None]
    if forces:
        spread["forces_std"] = force_std(torch.stack(forces).double()).cpu().numpy()
    return spread


def _check_finite(result: Evaluation, order: np.ndarray | None) -> None:
    """Raise ValueError where energy or forces are not finite, saying why."""
    forces = result.forces
    if bool(result.energy.isfinite()) and (forces is None or bool(forces.isfinite().all())):
        return
    touching = torch.nonzero((result.r_ij == 0.0).all(dim=1))
    if len(touching):
        p = int(touching[0])
        i, j = int(result.pairs.receiver[p]), int(result.pairs.sender[p])
        if order is not None:
            i, j = int(order[i]), int(order[j])
        raise ValueError(f"atoms {i} and {j} are at the same place: forces are not defined there")
    raise ValueError(
        "energy or forces are not finite although the positions are: the network overflows for "
        "this structure; inspect distances and density"
    )
