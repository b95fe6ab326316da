"""The LAMMPS instance behind LAMMPS's own ML-IAP coupling.

LAMMPS's coupling (plain or KOKKOS) tells a unified object neither its units, nor its version, nor
how many ranks there are, nor how far ghost atoms reach. All of that decides whether a run is
right, so it is asked for here, through LAMMPS's C library interface. The handle for it is found
in the coupling's objects:

    MLIAPUnifiedInterface   ... | model | descriptor | unified object       (Cython class)
    model                   virtual table | LAMMPS *lmp | ...               (C++ class Pointers)
    LAMMPS                  memory error universe input atom update neighbor comm domain ...

Nothing of this layout is taken on trust: memory is read through the operating system, so that a
wrong address is an error and no crash, and the addresses must agree with what the C library says
about the same instance. If they do not, there is no `Native`, and callers do without.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_int, c_void_p
from dataclasses import dataclass
from typing import Any

_WORD = ctypes.sizeof(c_void_p)
_OBJECT_WORDS = 8  # the Cython object is far shorter
_ATOM, _NEIGHBOR, _COMM, _DOMAIN = 4, 6, 7, 8  # words of class LAMMPS
_OBJECT_SIZE = 16384  # larger than Atom, Neighbor and Domain
_COMM_CUTOFF = "_ZN9LAMMPS_NS4Comm15get_comm_cutoffEv"  # double Comm::get_comm_cutoff()


def behind(interface: Any, unified: Any) -> Native | None:
    """The LAMMPS that has handed `interface` to `unified`.

    Args:
        interface: the object that LAMMPS's coupling sets as `unified.interface`.
        unified: the MLIAPUnified object itself.

    Returns:
        None where the coupling looks unlike what is known, or LAMMPS's C library is not visible
        in this process (a statically linked `lmp`).
    """
    if "mliap_unified_couple" not in type(interface).__module__:
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "lammps_extract_global"):
        return None
    words = _read(id(interface), _OBJECT_WORDS)
    if id(unified) not in words[2:]:
        return None
    place = words.index(id(unified), 2)
    if place < 4:
        return None
    model = _read(words[place - 2], 2)
    if not model:
        return None
    native = Native(library, model[1])
    return native if native.is_consistent() else None


@dataclass(frozen=True, eq=False)
class Native:
    """A LAMMPS instance.

    Attributes:
        library: the C library.
        handle: address of the instance.
    """

    library: Any
    handle: int

    def is_consistent(self) -> bool:
        """Whether what lies at the handle agrees with what LAMMPS says of it."""
        words = _read(self.handle, _DOMAIN + 1)
        if not words:
            return False
        insides = {_ATOM: "nlocal", _NEIGHBOR: "neigh_skin", _DOMAIN: "boxlo"}
        return all(
            0 < (self._global(name) or 0) - words[place] < _OBJECT_SIZE
            for place, name in insides.items()
        )

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self.library, name)
        function.restype = result
        return function(c_void_p(self.handle), *arguments)

    def _global(self, name: str) -> int | None:
        address: int | None = self._call("lammps_extract_global", c_void_p, name.encode())
        return address

    def _number(self, name: str) -> float:
        return c_double.from_address(self._global(name) or 0).value

    def setting(self, name: str) -> int:
        """An integer of lammps_extract_setting, such as nlocal; -1 if it is not known."""
        return int(self._call("lammps_extract_setting", c_int, name.encode()))

    @property
    def version(self) -> int:
        """Such as 20260704."""
        return int(self._call("lammps_version", c_int))

    @property
    def units(self) -> str:
        """LAMMPS's unit style."""
        return str(c_char_p(self._global("units")).value.decode())  # type: ignore[union-attr]

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.setting("world_rank")

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return self.setting("world_size")

    @property
    def n_atoms(self) -> int:
        """Number of atoms on all ranks."""
        return int(self._call("lammps_get_natoms", c_double))

    @property
    def skin(self) -> float:
        """Skin of the neighbour list, LAMMPS's length unit."""
        return self._number("neigh_skin")

    @property
    def volume(self) -> float | None:
        """Volume of the box, None before there is one."""
        if self.setting("box_exist") != 1:
            return None
        low, high = (
            (c_double * 3).from_address(self._global(name) or 0) for name in ("boxlo", "boxhi")
        )
        size: list[float] = [b - a for a, b in zip(low, high, strict=True)]
        return size[0] * size[1] * size[2]

    @property
    def comm_cutoff(self) -> float | None:
        """How far from a rank's own region ghosts are known; None if it cannot be asked for."""
        if not hasattr(self.library, _COMM_CUTOFF):
            return None
        function: Any = getattr(self.library, _COMM_CUTOFF)
        function.restype = c_double
        cutoff: float = function(c_void_p(_read(self.handle, _DOMAIN)[_COMM]))
        return cutoff


def _read(address: int, count: int) -> tuple[int, ...]:
    """`count` words from memory; empty where nothing is mapped there."""
    if not 0 < address < 2**63:
        return ()
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            raw = os.pread(memory.fileno(), count * _WORD, address)
    except OSError:
        return ()
    if len(raw) != count * _WORD:
        return ()
    return tuple((ctypes.c_size_t * count).from_buffer_copy(raw))
