"""HipnnModel: HIP-NN potentials as a model of torch-sim, many systems at once on one device.

torch-sim (https://github.com/TorchSim/torch-sim) brings the dynamics: NVE, Langevin, NPT,
relaxation, automatic batches. It hands over a `SimState`; back go

    energy (n_systems,) eV       forces (n_atoms, 3) eV/Å       stress (n_systems, 3, 3) eV/Å^3

    stress = (1 / V) dE/d(strain) = -W / V          positive under tension, as in ASE

All systems are one disconnected set of pairs, whose list stays on the device: a step makes the
host wait to hear whether the list still holds (and, in fused inference, whether the forces are
finite). One system alone on a CPU has the list of the ASE calculator, along a space-filling curve.
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
        dtype: "mixed" (float64 states and sums, float32 network), "float64", "float32", or "fast";
            see `md_plugin.potential`.
        backend: kernels; None and "auto" choose by themselves.
        skin: extra distance in the neighbour list, Å; the list is reused while it is provably
            complete. 0 rebuilds at every change.

    Attributes:
        potential: the potential.
        n_builds: how many neighbour lists were built.
        compute_forces, compute_stress: what `forward` returns besides the energy; both may be
            set. NVE and Langevin need no stress, which takes some of the time on CPUs.

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
        self._list = NeighbourList(self.potential.rcut, skin, ordered=True)
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
        fused, on_host = not self.potential.why_not_fused(), self._device.type == "cpu"
        if fused and on_host and systems.n_systems == 1:
            energy, forces, virial = self._alone(systems)
        else:
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
        """All systems as one set of pairs -> energies, forces and, if asked for, virials."""
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
        forces = self._compute_forces or self._compute_stress
        structure = systems.system if n > 1 else None
        if fused and forces and neighbours.n_translations <= MAX_TRANSLATIONS:
            # Virials of systems cost a little; energies are added up in any case.
            split = (structure, n) if self._compute_stress else (None, 1)
            result = potential.evaluate_geometry(
                systems.species, geometry, structure=split[0], n_structures=split[1]
            )
            energy = segment_sum(result.atom_energy, systems.system, n)
        else:
            result = potential.evaluate_pairs(
                systems.species,
                geometry.pairs,
                geometry.r_ij(),
                structure=structure,
                n_structures=n,
                forces=forces,
            )
            energy = result.energy
        virial = result.virial if self._compute_stress else None
        return energy, _or_empty(result.forces), _or_empty(virial)

    def _alone(self, systems: Systems) -> tuple[Tensor, Tensor, Tensor]:
        """One system by fused inference -> energy, forces and virial."""
        if self._species is None or not torch.equal(self._species, systems.species):
            self.potential.check_species(systems.species)
            self._species = systems.species.clone()
        x, h = systems.positions.double().numpy(), systems.cell[0].double().numpy()
        self.n_builds += self._list.update(x, h, systems.pbc)
        order = self._list.order
        result = self.potential.evaluate_geometry(
            systems.species if order is None else systems.species[order],
            self._list.geometry(x, h),
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
