"""From LAMMPS's data object to the model's arguments, and results back.

The only file that reads LAMMPS's attribute names (with `couplings`, which tells the hosts apart).
It serves three hosts alike: pair_style mliap/py (`PluginData`), plain ML-IAP (numpy), and ML-IAP
with KOKKOS (cupy, or numpy on the host). All list pairs inside the cutoff row by row, and all
take dE/dr_ij back by `update_pair_forces`, which adds forces and virial.

Receivers must be the senders 0 .. n_recv - 1. LAMMPS's rows are its atoms 0 .. nlocal - 1 unless
another pair style handles some types (pair_style hybrid); then atoms are renumbered: rows first,
then the other atoms of known types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lammps_interface import couplings
from lammps_interface.couplings import device_of
from lammps_interface.exchange import LammpsHalo
from md_plugin.committee import energy_std, force_std
from md_plugin.device_neighbours import search_cells
from md_plugin.devices import Staging
from md_plugin.evaluation import Evaluation
from md_plugin.pairs import Geometry, Pairs
from md_plugin.units import UnitStyle

_INDEX = torch.int64


@dataclass(frozen=True, eq=False)
class EngineStep:
    """One step as the model wants it.

    Attributes:
        elems: (n_send,) int64 index into the model's elements.
        pairs: neighbours inside the cutoff.
        r_ij: (n_pair, 3) float64, LAMMPS's length unit.
        halo: exchange over LAMMPS, None where the host has none.
        n_local: receivers that are LAMMPS's local atoms; ghosts with rows of their own follow.
        order: (n_send,) atom index in LAMMPS of each sender; None where sender k is atom k.
    """

    elems: Tensor
    pairs: Pairs
    r_ij: Tensor
    halo: LammpsHalo | None
    n_local: int
    order: Tensor | None

    @property
    def has_ghosts(self) -> bool:
        """Whether some senders are not among the receivers."""
        return self.pairs.n_send > self.n_local

    def local_order(self) -> Tensor | slice:
        """Atom index in LAMMPS of each local receiver."""
        return slice(self.n_local) if self.order is None else self.order[: self.n_local]


def _tensor(data: Any, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first `count` rows of an array; nothing is asked for where there are none.

    LAMMPS's Cython couplings raise when an array of length zero is touched.
    """
    if count == 0:
        return torch.empty((0, 3) if name == "rij" else (0,), dtype=dtype, device=device)
    return torch.as_tensor(getattr(data, name), device=device)[:count].to(dtype)


def read_step(data: Any, *, ghost_rows: bool = False, staging: Staging | None = None) -> EngineStep:
    """Views LAMMPS's arrays as the model's arguments, on LAMMPS's device.

    Args:
        data: LAMMPS's data object.
        ghost_rows: whether ghosts are receivers too, with the neighbours that `ghostneigh 1` gives
            them. Without it such rows, which come last, are left out.
        staging: for exchanges, where the model is on another device.

    Raises:
        ValueError: a pair leads to an atom that this pair style does not handle.
    """
    device = device_of(data)
    couplings.fence(device)
    n_local, n_send, n_pair = int(data.nlistatoms), int(data.ntotal), int(data.npairs)
    n_recv = int(data.natomneigh) if ghost_rows else n_local
    rows = _tensor(data, "iatoms", n_recv, _INDEX, device)
    elems = _tensor(data, "elems", n_send, _INDEX, device)
    receiver = _tensor(data, "pair_i", n_pair, torch.int32, device)
    if data.natomneigh > n_recv:
        n_pair = int((receiver < data.nlocal).sum())
        receiver = receiver[:n_pair]
    r_ij = _tensor(data, "rij", n_pair, torch.float64, device)
    sender = _tensor(data, "pair_j", n_pair, torch.int32, device)
    order = None
    in_order = torch.equal(rows, torch.arange(n_recv, device=device))
    if not in_order or bool((elems < 0).any()):
        order, index = _renumber(rows, elems)
        sender, receiver = index[sender.long()], index[receiver.long()]
        _check_renumbered(order[sender.long()], sender, n_recv, data)
        elems, n_send = elems[order], order.numel()
    # rows come one after the other, so that counting the pairs of each is enough
    row_ptr = torch.zeros(n_recv + 1, dtype=torch.int32, device=device)
    row_ptr[1:] = torch.bincount(receiver, minlength=n_recv).cumsum(0)
    halo = None
    if hasattr(data, "forward_exchange"):
        halo = LammpsHalo(data, n_recv, device, order, staging)
    return EngineStep(elems, Pairs(row_ptr, sender, n_send), r_ij, halo, n_local, order)


def positions_of(data: Any, step: EngineStep, length: float) -> Tensor:
    """(n_send, 3) Å, in the order of the senders; `length` is Å per length unit of LAMMPS."""
    x = torch.from_numpy(data.x)
    return length * (x if step.order is None else x[step.order])


class EngineGeometry:
    """Positions and pairs of mliap/py where a model computes, kept from step to step.

    On a CPU both are LAMMPS's own memory. Elsewhere a step sends the positions, 24 bytes an atom,
    and pairs are found there as soon as LAMMPS has new ghosts: LAMMPS's list, 4 bytes a pair, would
    be as much as 10 to 20 steps of positions, and LAMMPS need not make it. Where that list is not
    simply all pairs (neigh_modify exclude), it goes over once per rebuild.

    Args:
        species: atomic number of each of the model's elements.
        length: Å per length unit of LAMMPS.
        rcut: cutoff, Å.
        device: where the model computes.
        finds_pairs: whether pairs are found there.
    """

    def __init__(
        self,
        species: Sequence[int],
        length: float,
        rcut: float,
        device: torch.device,
        finds_pairs: bool,
    ):
        self.length, self.rcut, self.device, self.finds_pairs = length, rcut, device, finds_pairs
        self.staging = Staging(device)
        self._numbers = torch.tensor(species)
        self._count = -1
        self._pairs: Pairs | None = None
        self._elems, self._species = np.zeros(0, np.int32), torch.zeros(0, dtype=_INDEX)

    def read(self, data: Any) -> tuple[Tensor, Geometry] | None:
        """(ntotal,) atomic numbers, and the geometry, Å; where the model computes.

        None where another pair style handles some types (on every rank alike), or rows are not
        atoms in their order, which takes `read_step`.
        """
        if data.has_null or not np.array_equal(data.iatoms, np.arange(len(data.iatoms))):
            return None
        if not np.array_equal(data.elems, self._elems):
            self._elems = data.elems.copy()
            self._species = self._numbers[torch.from_numpy(self._elems).long()].to(self.device)
        x = torch.from_numpy(data.x)
        if self.finds_pairs or self.device.type != "cpu":
            x = self.staging.send(x)
        x = x if self.length == 1.0 else x * self.length
        if self._pairs is None or data.list_count != self._count:
            self._count, self._pairs = data.list_count, self._new_pairs(data, x)
        return self._species, Geometry(x, self._pairs)

    def _new_pairs(self, data: Any, x: Tensor) -> Pairs:
        if self.finds_pairs and data.whole_list:
            check_positions(data.x)
            rcut = self.rcut + self.length * data.skin
            return search_cells(x, np.eye(3)[None], False, rcut, n_recv=len(data.iatoms)).pairs
        row_ptr, sender = torch.from_numpy(data.row_ptr), torch.from_numpy(data.sender)
        return Pairs(row_ptr, sender, len(x)).to(self.device)


def _renumber(rows: Tensor, elems: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the senders, (n_send,) atom indices, and its inverse (ntotal,), int32, or -1."""
    other = elems >= 0
    other[rows] = False
    order = torch.cat([rows, other.nonzero()[:, 0]])
    index = torch.full_like(elems, -1, dtype=torch.int32)
    index[order] = torch.arange(order.numel(), dtype=torch.int32, device=rows.device)
    return order, index


def _check_renumbered(atoms: Tensor, sender: Tensor, n_recv: int, data: Any) -> None:
    nlocal = getattr(data, "nlocal", n_recv)
    if bool((sender < 0).any()) or bool(((sender >= n_recv) & (atoms < nlocal)).any()):
        raise ValueError(
            "the neighbour list holds pairs with atoms that this pair style does not handle; "
            "check the NULL entries of pair_coeff"
        )


def check_positions(x: np.ndarray) -> None:
    """Raise ValueError where positions (n, 3) are not numbers."""
    n_bad = int((~np.isfinite(x).all(axis=1)).sum())
    if n_bad:
        raise ValueError(
            f"{n_bad} atoms have positions that are not numbers; the run has become unstable "
            "(time step too long, or a bad start)"
        )


def check_finite(energy: float, data: Any) -> None:
    """Raise ValueError where the energy of a step is not a number, saying why."""
    if math.isfinite(energy):
        return
    check_positions(getattr(data, "x", np.zeros((0, 3))))
    raise ValueError(
        f"the energy is {energy}: atoms are probably far closer than the model was trained for"
    )


def write_results(data: Any, energy: float, atom_energy: Tensor, pair_gradient: Tensor) -> None:
    """Hands results to LAMMPS.

    Args:
        data: LAMMPS's data object.
        energy: of this rank's atoms, LAMMPS's energy unit.
        atom_energy: (n_local,) energies in the order of the rows.
        pair_gradient: (n_pair, 3) dE/dr_ij, which is the force on the receiver along the pair.
            LAMMPS's pairs beyond the first n_pair get none.
    """
    device = device_of(data)
    data.energy = energy
    if data.nlistatoms:
        values = atom_energy.detach().to(device, torch.float64).contiguous()
        if "kokkos" in type(data).__module__:  # offers a view, and no way to set it
            torch.as_tensor(data.eatoms, device=device)[:] = values
        else:
            data.eatoms = values.numpy()
    if pair_gradient.shape[0]:
        forces = pair_gradient.detach().to(device, torch.float64).contiguous()
        if missing := int(data.npairs) - forces.shape[0]:
            forces = torch.cat([forces, forces.new_zeros(missing, 3)])
        couplings.fence(device)
        data.update_pair_forces(forces if device.type == "cuda" else forces.numpy())
    couplings.fence(device)  # only then may torch give the memory of `forces` to others


def write_sums(data: Any, energy: float, found: Evaluation, units: UnitStyle) -> None:
    """Hands atom energies, forces and virials of fused inference to mliap/py.

    Args:
        data: the data object of mliap/py.
        energy: of this rank's atoms, LAMMPS's energy unit.
        found: eV and Å.
        units: of LAMMPS.
    """
    assert found.sums is not None
    forces, virial, atom_virial = found.sums
    data.energy = energy
    data.eatoms = (found.atom_energy / units.energy).numpy()
    data.f += (forces.double() / units.force).numpy()
    data.add_virial((virial[0].double() / units.energy).numpy())
    if atom_virial is not None and data.ntotal:
        # xx yy zz xy xz yz
        values = atom_virial[:, (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)]
        data.vatom[:] += (values.double() / units.energy).numpy()


def write_centroid(data: Any, step: EngineStep, virial: Tensor) -> None:
    """Adds (n_send, 3, 3) centroid virials, LAMMPS's energy unit, to those of mliap/py's atoms."""
    # xx yy zz xy xz yz yx zx zy: LAMMPS's order, rows of the first index
    rows, columns = (0, 1, 2, 0, 0, 1, 1, 2, 2), (0, 1, 2, 1, 2, 2, 0, 0, 1)
    values = virial[:, rows, columns].double().cpu().numpy()
    order = slice(None) if step.order is None else step.order.numpy()
    data.cvatom[order] += values


def write_spread(
    data: Any, step: EngineStep, found: Evaluation, energy: float, force: float
) -> None:
    """Spread of a committee's energies and forces for `fix pair`; every rank calls it.

    Args:
        data: the data object of mliap/py.
        step: the step that was evaluated.
        found: what the committee says, eV and Å.
        energy: eV per energy unit of LAMMPS.
        force: eV/Å per force unit of LAMMPS.
    """
    assert step.halo is not None
    members = found.members
    forces = torch.cat([m.forces for m in members if m.forces is not None], dim=1).double()
    # forces on ghosts belong to their owners, in every member by itself
    owned = step.halo.adjoint(forces).reshape(-1, len(members), 3).transpose(0, 1)
    local = step.local_order()
    data.force_std[local] = (force_std(owned[:, : step.n_local]) / force).cpu().numpy()
    energies = torch.stack([m.atom_energy for m in members])
    data.energy_std[local] = (energy_std(energies) / energy).cpu().numpy()
