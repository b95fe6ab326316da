"""The data object that pair_style mliap/py hands to `compute_forces(data)`.

It offers the attributes of LAMMPS's own ML-IAP data object, with their meaning and shapes, so
that any MLIAPUnified object runs under it:

    ntotal nlocal nlistatoms npairs    numbers of atoms with ghosts, local atoms, rows, pairs
    elems iatoms ielems numneighs      (ntotal,) (nlistatoms,) (nlistatoms,) (nlistatoms,)
    pair_i pair_j jatoms jelems rij    (npairs,) ... (npairs, 3): pairs inside the cutoff
    energy eatoms f                    written: scalar, (nlistatoms,), (ntotal, 3)
    tag                                (ntotal,) global ids, None where atoms have none
    update_pair_energy update_pair_forces forward_exchange reverse_exchange eflag vflag

and what makes it fast: `x`, the pair list with its skin (`row_ptr`, `sender`), `list_count`,
which grows each time that list was rebuilt, `skin`, `whole_list` (see `session`: finds_pairs),
and `add_virial`; and what only this pair style has: centroid virials (`want_centroid`, `cvatom`)
and the spread of a committee (`want_std`, `force_std`, `energy_std`). Pair arrays inside the cutoff
are built only when they are asked for. Arrays are views of LAMMPS's memory, valid during one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lammps_interface.view import View, array_at


def _host_rows(name: str, rows: Any, count: int) -> np.ndarray:
    """A writable, contiguous 1-d numpy view of a numpy array or CPU torch tensor."""
    if hasattr(rows, "detach"):
        if rows.device.type != "cpu":
            raise TypeError(f"{name} is on {rows.device}; mliap/py exchanges arrays on the CPU")
        if not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() before the exchange")
        rows = rows.detach().numpy()
    if not isinstance(rows, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, not {type(rows)}")
    if rows.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {rows.dtype}; exchanges take float32 and float64")
    if not rows.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    if rows.size != count:
        raise ValueError(
            f"{name} has shape {rows.shape}; an exchange needs {count} numbers, one row for each "
            "local and ghost atom (ntotal)"
        )
    return rows.reshape(-1)


class PluginData:
    """What `compute_forces(data)` receives under pair_style mliap/py; see the module page."""

    def __init__(self, view: View, *, elements: Sequence[str], ndescriptors: int, nparams: int):
        self._view = view
        self._inside = False
        self.nelements = len(elements)
        self.ndescriptors = ndescriptors
        self.nparams = nparams
        self.units: str = view.units.decode()

    def begin_step(self) -> None:
        """Reads the view again; called by the session before each step."""
        view = self._view
        self._inside = False
        self.ntotal: int = view.ntotal
        self.nlocal: int = view.nlocal
        self.nlistatoms: int = view.nlist
        self.natomneigh: int = view.nlist
        self.eflag: int = view.eflag
        self.vflag: int = view.vflag
        self.step: int = view.step
        self.list_count: int = view.list_count
        self.whole_list = bool(view.whole_list)
        self.skin: float = view.skin
        self.want_std = bool(view.want_std)
        self.want_centroid = bool(view.want_centroid)
        # whether another pair style handles some types
        self.has_null = bool((array_at(view.type_map, (view.ntypes,), np.int32) < 0).any())
        self.x = array_at(view.x, (view.ntotal, 3), np.float64)
        self.f = array_at(view.f, (view.ntotal, 3), np.float64)
        self.elems = array_at(view.elems, (view.ntotal,), np.int32)
        self.iatoms = array_at(view.ilist, (view.nlist,), np.int32)
        tag = np.int64 if view.tag_bytes == 8 else np.int32
        self.tag = array_at(view.tag, (view.ntotal,), tag) if view.tag else None

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError((self._view.error_text or b"unknown error in the plugin").decode())

    # the pair list with its skin

    @property
    def row_ptr(self) -> np.ndarray:
        """(nlistatoms + 1,) int32, start of each row in `sender`."""
        self._check(self._view.list_pairs(self._view.pair))
        return array_at(self._view.row_ptr, (self.nlistatoms + 1,), np.int32)

    @property
    def sender(self) -> np.ndarray:
        """(n_pair,) int32 atom index of each neighbour, skin included."""
        self._check(self._view.list_pairs(self._view.pair))
        return array_at(self._view.sender, (self._view.n_pair,), np.int32)

    # LAMMPS's own pair arrays, strictly inside the cutoff

    def _inside_array(self, field: str, columns: tuple[int, ...], dtype: type) -> np.ndarray:
        if not self._inside:
            self._check(self._view.inside_pairs(self._view.pair))
            self._inside = True
        return array_at(getattr(self._view, field), (self._view.n_inside, *columns), dtype)

    @property
    def npairs(self) -> int:
        """Number of pairs inside the cutoff."""
        return len(self.pair_i)

    @property
    def pair_i(self) -> np.ndarray:
        """(npairs,) atom index of the receiver."""
        return self._inside_array("inside_i", (), np.int32)

    @property
    def pair_j(self) -> np.ndarray:
        """(npairs,) atom index of the sender, ghosts included."""
        return self._inside_array("inside_j", (), np.int32)

    @property
    def jatoms(self) -> np.ndarray:
        """The same as `pair_j`."""
        return self.pair_j

    @property
    def rij(self) -> np.ndarray:
        """(npairs, 3) x[j] - x[i]."""
        return self._inside_array("inside_rij", (3,), np.float64)

    @property
    def numneighs(self) -> np.ndarray:
        """(nlistatoms,) pairs inside the cutoff of each row."""
        self._inside_array("inside_i", (), np.int32)
        return array_at(self._view.numneighs, (self.nlistatoms,), np.int32)

    @property
    def ielems(self) -> np.ndarray:
        """(nlistatoms,) element index of each row."""
        return np.take(self.elems, self.iatoms)

    @property
    def jelems(self) -> np.ndarray:
        """(npairs,) element index of each sender."""
        return np.take(self.elems, self.pair_j)

    # results

    @property
    def energy(self) -> float:
        """Energy of this rank's atoms."""
        return float(self._view.energy)

    @energy.setter
    def energy(self, value: Any) -> None:
        self._view.energy = float(value)

    @property
    def eatoms(self) -> np.ndarray:
        """(nlistatoms,) energy of each row's atom."""
        return array_at(self._view.eatoms, (self.nlistatoms,), np.float64)

    @eatoms.setter
    def eatoms(self, value: Any) -> None:
        self.eatoms[:] = _numbers("eatoms", value, (self.nlistatoms,))

    @property
    def vatom(self) -> np.ndarray | None:
        """(ntotal, 6) per-atom virial to add to (xx yy zz xy xz yz), None if not wanted."""
        if not self._view.vatom:
            return None
        return array_at(self._view.vatom, (self.ntotal, 6), np.float64)

    @property
    def cvatom(self) -> np.ndarray | None:
        """(ntotal, 9) to add xx yy zz xy xz yz yx zx zy to; None without atoms or if not wanted."""
        if not self._view.cvatom:
            return None
        return array_at(self._view.cvatom, (self.ntotal, 9), np.float64)

    @property
    def force_std(self) -> np.ndarray:
        """(nlocal,) to fill where `want_std` is true: spread of a committee's forces."""
        return array_at(self._view.force_std, (self.nlocal,), np.float64)

    @property
    def energy_std(self) -> np.ndarray:
        """(nlocal,) to fill where `want_std` is true: spread of a committee's atom energies."""
        return array_at(self._view.energy_std, (self.nlocal,), np.float64)

    def add_virial(self, virial: np.ndarray) -> None:
        """Adds a (3, 3) virial, sum of r (x) force, to this rank's virial."""
        for k, (a, b) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))):
            self._view.virial[k] += float(virial[a, b])

    def update_pair_energy(self, eij: Any) -> None:
        """Gives half of each (npairs,) energy to the receiver; replaces energy and eatoms."""
        half = 0.5 * _numbers("eij", eij, (self.npairs,))
        row = self._inside_array("inside_row", (), np.int32)
        self.eatoms = np.bincount(row, weights=half, minlength=self.nlistatoms)
        self.energy = half.sum()

    def update_pair_forces(self, fij: Any) -> None:
        """Adds (npairs, 3) forces to i, subtracts them from j, and adds their virial."""
        forces = _numbers("fij", fij, (self.npairs, 3))
        self._check(self._view.pair_forces(self._view.pair, forces.ctypes.data))

    update_pair_forces_gpu = update_pair_forces  # its name in KOKKOS, which MACE asks for

    # features of ghost atoms

    def forward_exchange(self, copy_from: Any, copy_to: Any, vec_len: int) -> None:
        """Copies all (ntotal, vec_len) rows, then fills ghost rows with their owners' rows."""
        self._exchange(copy_from, copy_to, vec_len, reverse=False)

    def reverse_exchange(self, copy_from: Any, copy_to: Any, vec_len: int) -> None:
        """Copies all (ntotal, vec_len) rows, then adds ghost rows to their owners' rows."""
        self._exchange(copy_from, copy_to, vec_len, reverse=True)

    def _exchange(self, copy_from: Any, copy_to: Any, vec_len: int, *, reverse: bool) -> None:
        width = self._view.comm_width
        if width <= 0:
            raise RuntimeError("this object exchanges features but its comm_width is 0")
        count = self.ntotal * vec_len
        rows = _host_rows("copy_to", copy_to, count)
        if copy_from is not copy_to:
            source = _host_rows("copy_from", copy_from, count)
            if source.dtype != rows.dtype:
                raise TypeError(f"copy_from is {source.dtype} but copy_to is {rows.dtype}")
            rows[:] = source
        item = rows.itemsize
        row_bytes, block = vec_len * item, width * 8
        for first in range(0, row_bytes, block):
            n_bytes = min(block, row_bytes - first)
            self._check(
                self._view.exchange(
                    self._view.pair, reverse, rows.ctypes.data, row_bytes, first, n_bytes, item
                )
            )


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Float64, contiguous, of the expected shape; from numpy, torch or a list."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.ascontiguousarray(value, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array
