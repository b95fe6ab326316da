"""Basis: the contracted Gaussians of one composition, without positions.

    chi(r) = N_l(r - A) sum_k c_k exp(-a_k |r - A|^2),    N_0 = 1, N_1 = x, y, z

Order and normalisation of the functions are PySCF's spherical ones: by atom, then angular momentum,
then shell; a p shell is x, y, z. The coefficients c_k hold every factor (contraction, primitive
norm, sqrt(1/4 pi) or sqrt(3/4 pi)), so that the formula above is the function itself. Positions are
an argument of every integral, and a Basis serves a whole trajectory.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.nanodft.errors import UnsupportedSystem

MAX_AO = 150
MAX_NUMBER = 18
SUPPORTED = (
    "supported are H to Ar with sets of s and p shells, such as sto-3g and 6-31g, "
    f"and at most {MAX_AO} functions"
)


@dataclass(frozen=True, eq=False)
class Basis:
    """Shells of one composition and basis set, on the CPU.

    Attributes:
        numbers: (n_atom,) atomic numbers.
        name: the basis set.
        n_ao: number of basis functions.
        atom: (n_shell,) int64, the atom that a shell sits on.
        l: (n_shell,) int64, angular momentum, 0 or 1.
        ao: (n_shell,) int64, the shell's first function.
        exponents: per shell (n_prim,) float64, 1/bohr^2.
        coefficients: per shell (n_prim,) float64, c_k of the module's formula.
    """

    numbers: tuple[int, ...]
    name: str
    n_ao: int
    atom: Tensor
    l: Tensor
    ao: Tensor
    exponents: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    _mole: Any = field(repr=False)

    @staticmethod
    def build(numbers: Sequence[int] | np.ndarray | Tensor, name: str) -> Basis:
        """The basis of a composition; the same object for the same arguments.

        Args:
            numbers: (n_atom,) atomic numbers, in the order of the positions to come.
            name: a basis set that PySCF knows, such as "sto-3g" or "6-31g".

        Raises:
            ValueError: numbers that are no integers.
            UnsupportedSystem: unknown set, no data for an element, d shells or higher, general
                contractions, elements beyond Ar, no atoms, more than 150 functions.
            ImportError: PySCF, which holds the data, is absent.
        """
        return _build(integers(numbers), name)

    @property
    def n_atom(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    def mole(self, positions: Tensor) -> Any:
        """The `pyscf.gto.Mole` at these positions (n_atom, 3) in bohr; charge and spin unset."""
        coordinates = positions.detach().cpu().numpy()
        return self._mole.set_geom_(coordinates, unit="Bohr", inplace=False)


def integers(numbers: Iterable[Any]) -> tuple[int, ...]:
    """Atomic numbers as integers.

    Raises:
        ValueError: they are none; fractions are not rounded.
    """
    try:
        return tuple(operator.index(z) for z in numbers)
    except TypeError as error:
        raise ValueError(f"atomic numbers must be integers: {error}") from error


def _pyscf_gto() -> Any:
    try:
        from pyscf import gto
    except ImportError as error:
        raise ImportError("nanodft needs PySCF: pip install 'md-plugin[dft]'") from error
    return gto


@lru_cache(maxsize=64)
def _build(numbers: tuple[int, ...], name: str) -> Basis:
    gto = _pyscf_gto()
    if not numbers:
        raise UnsupportedSystem("no atoms: a molecule has at least one")
    if wrong := sorted({z for z in numbers if not 1 <= z <= MAX_NUMBER}):
        raise UnsupportedSystem(f"atomic numbers {wrong} are out of range; {SUPPORTED}")
    shells = {z: _element_shells(gto, z, name) for z in sorted(set(numbers))}
    n_ao = sum(2 * l + 1 for z in numbers for l in shells[z])
    if n_ao > MAX_AO:
        raise UnsupportedSystem(f"{n_ao} functions of {name} are too many; {SUPPORTED}")
    mole = gto.Mole()
    # A line of atoms: the positions come later. Spin None: PySCF checks it, nothing here uses it.
    mole.build(
        atom=[[z, (3.0 * i, 0.0, 0.0)] for i, z in enumerate(numbers)],
        unit="Bohr", basis=name, spin=None, verbose=0, parse_arg=False, dump_input=False,
    )  # fmt: skip
    shell = range(mole.nbas)
    l = [int(mole.bas_angular(s)) for s in shell]
    norms = [math.sqrt((2 * l[s] + 1) / (4 * math.pi)) for s in shell]
    exponents = [mole.bas_exp(s) for s in shell]
    coefficients = [
        mole.bas_ctr_coeff(s)[:, 0] * gto.gto_norm(l[s], exponents[s]) * norms[s] for s in shell
    ]
    return Basis(
        numbers=numbers,
        name=name,
        n_ao=n_ao,
        atom=torch.tensor([int(mole.bas_atom(s)) for s in shell]),
        l=torch.tensor(l),
        ao=torch.tensor(mole.ao_loc_nr()[:-1].astype(np.int64)),
        exponents=tuple(torch.tensor(e, dtype=torch.float64) for e in exponents),
        coefficients=tuple(torch.tensor(c, dtype=torch.float64) for c in coefficients),
        _mole=mole,
    )


def _element_shells(gto: Any, number: int, name: str) -> list[int]:
    """Angular momenta of the shells of an element.

    Raises:
        UnsupportedSystem: no such set for it, or one with shells that nanodft cannot use.
    """
    from pyscf.data.elements import ELEMENTS

    symbol = ELEMENTS[number]
    try:
        with warnings.catch_warnings():  # PySCF warns of what is raised here
            warnings.simplefilter("ignore")
            shells = gto.basis.load(name, symbol)
    except Exception as error:  # PySCF raises whatever its parsers meet
        raise UnsupportedSystem(
            f"PySCF has no basis set {name!r} for {symbol}; {SUPPORTED}"
        ) from error
    if not shells:
        raise UnsupportedSystem(f"basis set {name!r} is empty for {symbol}; {SUPPORTED}")
    for l, *primitives in shells:
        if l > 1:
            raise UnsupportedSystem(f"{name} has shells of l = {l} for {symbol}; {SUPPORTED}")
        if not isinstance(primitives[0], list | tuple) or len(primitives[0]) != 2:
            raise UnsupportedSystem(f"{name} is a general contraction for {symbol}; {SUPPORTED}")
    return [int(shell[0]) for shell in shells]
