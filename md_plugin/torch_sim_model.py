"""HipnnModel: HIP-NN potentials as a model of torch-sim, many systems at once on one device.

torch-sim (https://github.com/TorchSim/torch-sim) brings the dynamics: NVE, Langevin, NPT,
relaxation, automatic batches. It hands over a `SimState`; back go

    energy (n_systems,) eV       forces (n_atoms, 3) eV/Å       stress (n_systems, 3, 3) eV/Å^3

    stress = (1 / V) dE/d(strain) = -W / V          positive under tension, as in ASE

All systems are one disconnected set of pairs, whose list stays on the device: a step makes the
host wait to hear whether the list still holds (and, in fused inference, whether the forces are
finite). Fused inference gives the sum of all virials: where the stress of several systems is asked
for, CPUs evaluate one after the other, each with a list of its own, and GPUs take the other path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md_plugin.batch_neighbours import MAX_TRANSLATIONS, BatchList, Systems
from md_plugin.checkpoint import load_model
from md_plugin.evaluation import segment_sum
from md_plugin.neighbours import NeighbourList
from md_plugin.potential import DTYPES, Potential

try:
    from torch_sim import SimState
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError("HipnnModel needs torch-sim: pip install 'md-plugin[torch-sim]'") from error


class HipnnModel(ModelInterface):
    """A HIP-NN potential for torch-sim.

    Args:
        model: path of a `.hipnn` file, name of a bundled model ("ta"), or a loaded `Potential`
            (then device, dtype and backend are those of the potential). A list of these is a
            committee, of which the means come back.
        device: "auto" takes CUDA if there is one.
        dtype: "mixed" (float64 states and sums, float32 network), "float64" or "float32".
        backend: kernels; None and "auto" choose by themselves.
        skin: extra distance in the neighbour list, Å; the list is reused while it is provably
            complete. 0 rebuilds at every change.

    Attributes:
        potential: the potential.
        n_builds: how many neighbour lists were built.
        compute_forces, compute_stress: what `forward` returns besides the energy; both may be
            set. NVE and Langevin need no stress; without it small systems on CPUs take a fraction
            of the time.

    Raises:
        CheckpointError: the model file is missing, damaged or too new.
        ValueError: the skin is negative, or there is no such device or dtype.
    """

    def __init__(
        self,
        model: str | Path | Potential | Sequence[str | Path | Potential],
        *,
        device: str | torch.device = "auto",
        dtype: str = "mixed",
        backend: str | None = None,
        skin: float = 0.5,
    ):
        super().__init__()
        if not skin >= 0:
            raise ValueError(f"skin must not be negative, got {skin} Å")
        self.potential = load_model(model, device=device, dtype=dtype, backend=backend)
        self.skin, self.n_builds = skin, 0
        self._device, self._dtype = self.potential.device, DTYPES[self.potential.dtype][0]
        self._compute_forces = self._compute_stress = True
        self._lists: list[NeighbourList] = []
        self._species: Tensor | None = None  # that were checked
        self._fractional: Tensor | None = None  # coordinates, as if nothing had been wrapped
        self._batch = BatchList(self.potential.rcut, skin)

    @property
    def compute_stress(self) -> bool:
        """Whether `forward` returns the stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute: bool) -> None:
        self._compute_stress = compute

    @property
    def compute_forces(self) -> bool:
        """Whether `forward` returns forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, compute: bool) -> None:
        self._compute_forces = compute

    def forward(self, state: SimState | dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Energy, forces and stress of every system.

        Args:
            state: a `SimState`, or its attributes as a dictionary (masses may be left out).

        Returns:
            "energy" (n_systems,) eV; "forces" (n_atoms, 3) eV/Å; "stress" (n_systems, 3, 3)
            eV/Å^3, NaN where not all three directions are periodic: there is no volume.

        Raises:
            ValueError: dtype or device of the state are not those of the model, an element that
                the model does not know, positions that are not finite, an unusable cell.
        """
        # torch-sim wraps positions in each step.
        systems, self._fractional = self._translate(state).near(self._fractional)
        fused, alone = not self.potential.why_not_fused(), systems.n_systems == 1
        on_host = self._device.type == "cpu"  # where systems have lists of their own
        if fused and on_host and (self._compute_stress or alone):
            energy, forces, virial = self._one_by_one(systems)
        else:
            fused = fused and (alone or not self._compute_stress)
            energy, forces, virial = self._together(systems, fused)
        found = {"energy": energy.to(self._dtype)}
        if self._compute_forces:
            found["forces"] = forces.to(self._dtype)
        if self._compute_stress:
            found["stress"] = _stress(virial, systems).to(self._dtype)
        return found

    def _translate(self, state: SimState | dict[str, Any]) -> Systems:
        if isinstance(state, dict):
            state = SimState(**{"masses": torch.ones_like(state["positions"][:, 0])} | state)
        if state.dtype != self._dtype or state.device.type != self._device.type:
            raise ValueError(
                f"the state holds {state.dtype} on {state.device}, but the model takes "
                f"{self._dtype} on {self._device}: state.to(model.device, model.dtype)"
            )
        pbc = state.pbc.tolist() if isinstance(state.pbc, Tensor) else state.pbc
        return Systems(
            state.atomic_numbers.long(),
            state.positions.detach(),
            state.cell.detach().mT,  # torch-sim keeps lattice vectors as columns
            state.system_idx.long(),
            (pbc,) * 3 if isinstance(pbc, bool) else tuple(pbc),
        )

    def _together(self, systems: Systems, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """All systems as one set of pairs -> energies, forces, virials (if fused, their sum)."""
        potential, neighbours, n = self.potential, self._batch, systems.n_systems
        if not neighbours.fits(systems):
            potential.check_species(systems.species)
            # Into their cells: atoms that have wandered far would make many images.
            middle = torch.full_like(systems.positions, 0.5)
            systems, self._fractional = systems.near(middle)
            neighbours.build(systems)
            self.n_builds += 1
            # Not in each step, where the host would wait for it.
            potential.check_distances(neighbours.geometry(systems).r_ij())
        geometry = neighbours.geometry(systems)
        if fused and self._compute_forces and neighbours.n_translations <= MAX_TRANSLATIONS:
            result = potential.evaluate_geometry(systems.species, geometry)
            energy = segment_sum(result.atom_energy, systems.system, n)
            return energy, _or_empty(result.forces), _or_empty(result.virial)
        result = potential.evaluate_pairs(
            systems.species,
            geometry.pairs,
            geometry.r_ij(),
            structure=systems.system if n > 1 else None,
            n_structures=n,
            forces=self._compute_forces or self._compute_stress,
        )
        virial = result.virial if self._compute_stress else None
        return result.energy, _or_empty(result.forces), _or_empty(virial)

    def _one_by_one(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """Each system by fused inference -> energies, forces, virials."""
        if self._species is None or not torch.equal(self._species, systems.species):
            self.potential.check_species(systems.species)
            self._species = systems.species.clone()
        del self._lists[systems.n_systems :]
        while len(self._lists) < systems.n_systems:
            self._lists.append(NeighbourList(self.potential.rcut, self.skin, ordered=True))
        sizes = systems.sizes()
        species = torch.split(systems.species, sizes)
        positions = torch.split(systems.positions.double(), sizes)
        parts = zip(self._lists, species, positions, systems.cell.double(), strict=True)
        energies, forces, virials = zip(*(self._one(*p, systems.pbc) for p in parts), strict=True)
        return torch.cat(energies), torch.cat(forces), torch.cat(virials)

    def _one(
        self,
        neighbours: NeighbourList,
        species: Tensor,
        positions: Tensor,
        cell: Tensor,
        pbc: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, h = positions.numpy(), cell.numpy()
        self.n_builds += neighbours.update(x, h, pbc)
        order = neighbours.order
        result = self.potential.evaluate_geometry(
            species if order is None else species[order],
            neighbours.geometry(x, h),
            forces=self._compute_forces or self._compute_stress,
        )
        forces = _or_empty(result.forces)
        if order is not None and result.forces is not None:
            forces = torch.empty_like(forces).index_copy_(0, torch.from_numpy(order), forces)
        return result.energy, forces, _or_empty(result.virial)

    def __repr__(self) -> str:
        return f"HipnnModel({self.potential!r}, skin={self.skin})"


def _or_empty(values: Tensor | None) -> Tensor:
    return torch.empty(0) if values is None else values


def _stress(virial: Tensor, systems: Systems) -> Tensor:
    """(n_systems, 3, 3) eV -> eV/Å^3, symmetric."""
    if not all(systems.pbc):
        return torch.full_like(virial, float("nan"))
    volume = torch.linalg.det(systems.cell).abs()
    # Symmetric by rotational invariance; the mean removes the rounding.
    stress: Tensor = -0.5 * (virial + virial.mT) / volume[:, None, None]
    return stress
