"""Which LAMMPS coupling runs a model, and whether it computes the right thing there.

| coupling | ghost features of models with several interaction layers |
| --- | --- |
| mliap/py (`PLUGIN`) | exchanged over LAMMPS's communication |
| ML-IAP (`PLAIN`) | computed on the ghosts themselves: `ghostneigh 1`, and ghosts far enough out |
| ML-IAP with KOKKOS on a GPU (`KOKKOS`) | exchanged |
| ML-IAP with KOKKOS on a CPU (`KOKKOS_HOST`) | refused: LAMMPS's exchange overruns its buffers |

Plain ML-IAP keeps a table of (rows, pairs) integers, 40 GB for 2,048 atoms with ghost rows. It is
predicted before LAMMPS allocates it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lammps_interface import faults
from lammps_interface.native import Native


def coupling_of(data: Any) -> str:
    """Which of the couplings above a data object comes from."""
    if hasattr(data, "list_count"):
        return faults.PLUGIN
    if not hasattr(data, "forward_exchange") and "kokkos" not in type(data).__module__:
        return faults.PLAIN
    return faults.KOKKOS if device_of(data).type == "cuda" else faults.KOKKOS_HOST


def device_of(data: Any) -> torch.device:
    """Where LAMMPS's arrays live."""
    if data.ntotal:
        # f is asked for, not an index array: those cannot be made where there are no pairs
        forces = data.f
        if not hasattr(forces, "__cuda_array_interface__"):
            return torch.device("cpu")
        return torch.device("cuda", getattr(getattr(forces, "device", None), "id", 0))
    if "kokkos" in type(data).__module__ and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def fence(device: torch.device) -> None:
    """Waits for all that LAMMPS and torch have given to a GPU; nothing on a CPU.

    KOKKOS and torch have streams of their own. Whoever reads what the other wrote, or frees what
    the other reads, waits here first: at the input, around each exchange, and after the results.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Coupling:
    """The rules for one model in one coupling.

    Args:
        kind: PLUGIN, PLAIN, KOKKOS or KOKKOS_HOST of `faults`.
        n_exchanges: interaction layers of the model - 1.
        rcut: of the model, LAMMPS's length unit.
        native: the LAMMPS instance, None where it could not be found.

    Raises:
        ValueError: the model would give wrong results here; with the remedy.
    """

    def __init__(self, kind: str, n_exchanges: int, rcut: float, native: Native | None):
        self.kind, self.n_exchanges, self.native = kind, n_exchanges, native
        self.reach = (n_exchanges + 1) * rcut
        self.ghost_rows = kind == faults.PLAIN and n_exchanges > 0
        needs = set()
        if n_exchanges and kind != faults.PLAIN:
            needs.add(faults.EXCHANGE)
        if self.ghost_rows and native:  # without it, check_step refuses ghost rows anyway
            needs.add(faults.GHOSTNEIGH)
        version = native.version if native else faults.installed_version()
        self.told = faults.check(kind, needs, version)

    def check_step(self, data: Any, has_ghosts: bool) -> None:
        """Refuses a step in which ghosts know too little of their neighbours.

        Args:
            data: LAMMPS's data object.
            has_ghosts: whether this rank has ghost atoms of elements that the model handles.

        Raises:
            ValueError: with the remedy.
        """
        if not self.ghost_rows or not has_ghosts:
            return
        skin = self.native.skin if self.native else math.nan
        layers = f"this model has {self.n_exchanges + 1} interaction layers"
        remedy = (
            f"write 'comm_modify cutoff {math.ceil(10 * (self.reach + skin)) / 10}'"
            if self.native
            else f"write 'comm_modify cutoff' with {self.reach:g} plus the skin"
        )
        if data.natomneigh <= data.nlistatoms:
            raise ValueError(
                f"{layers}, and plain ML-IAP does not exchange features: write 1 instead of 0 "
                f"behind the file name ('pair_style mliap unified FILE 1') and {remedy}, so that "
                f"they are computed on ghost atoms too; or, much faster, {faults.USE_PLUGIN}; or "
                "use KOKKOS on a GPU (-sf kk)"
            )
        reached = self.native.comm_cutoff if self.native else None
        if reached is None:
            raise ValueError(
                f"{layers} and needs ghost atoms up to {self.reach:g} and the skin away, but this "
                "lmp does not tell its communication cutoff: build LAMMPS with "
                f"BUILD_SHARED_LIBS=ON, or {faults.USE_PLUGIN}"
            )
        if reached < self.reach + skin - 1e-9:
            raise ValueError(
                f"{layers}, whose ghost features need ghost atoms up to {self.reach + skin:g} away "
                f"(layers times cutoff, plus the skin), but they are known up to {reached:g}: "
                f"{remedy}; or, much faster, {faults.USE_PLUGIN}"
            )


def predicted_table(native: Native, rcut: float, n_exchanges: int) -> float:
    """Bytes of plain ML-IAP's table on each rank, from the density of the box; 0 if not known.

    Args:
        native: the LAMMPS instance.
        rcut: cutoff, LAMMPS's length unit.
        n_exchanges: interaction layers - 1; with several, ghosts have rows too.
    """
    volume = native.volume
    if not volume or native.n_atoms <= 0:
        return 0.0
    density = native.n_atoms / volume
    rows = native.n_atoms / native.n_ranks
    if n_exchanges:
        side = (volume / native.n_ranks) ** (1 / 3)
        rows = density * (side + 2 * (n_exchanges + 1) * rcut) ** 3
    pairs = rows * density * 4 / 3 * math.pi * rcut**3
    return 4.0 * rows * pairs


def check_table(native: Native, rcut: float, n_exchanges: int) -> None:
    """Refuses a run whose table would not fit into memory.

    Raises:
        ValueError: with sizes and the remedy.
    """
    needed, there = predicted_table(native, rcut, n_exchanges), available_memory()
    if there is None or needed <= there:
        return
    raise ValueError(
        f"LAMMPS's plain ML-IAP keeps a table of atoms times pairs: about {needed / 1e9:.0f} GB on "
        f"each rank for {native.n_atoms} atoms, where {there / 1e9:.0f} GB of memory are free. "
        f"Ours grows linearly: {faults.USE_PLUGIN}; or use KOKKOS on a GPU (-sf kk)"
    )


def available_memory() -> int | None:
    """Bytes that this node can still give, None if it does not say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None
