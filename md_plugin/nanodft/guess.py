"""Starting density: free atoms side by side, each with its electrons spread over open shells.

The atoms come from Hartree-Fock in the molecule's own basis set with spherical averages:

    D_atom = sum_shells n_shell / (2 l + 1) sum_m c_lm c_lm^T

so that nothing depends on positions and one guess serves a whole trajectory. The charge of the
molecule is left to the first cycles.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from md_plugin.nanodft import integrals
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.scf import Diis, Hamiltonian, commutator, inverse_root, orbitals_of

# (l, electrons) in the order in which atoms to Ar are filled.
_SHELLS = ((0, 2), (0, 2), (1, 6), (0, 2), (1, 6))
_CYCLES = 40
_TOLERANCE = 1e-6  # of the orbital gradient, Ha; a guess needs no more


def superposition_of_atoms(basis: Basis) -> Tensor:
    """(n_ao, n_ao) density matrix of the neutral atoms of a basis, on the CPU."""
    dm = torch.zeros(basis.n_ao, basis.n_ao, dtype=torch.float64)
    start = 0
    for number in basis.numbers:
        atom = _atomic_density(number, basis.name)
        stop = start + len(atom)
        dm[start:stop, start:stop] = atom
        start = stop
    return dm


@lru_cache(maxsize=64)
def _atomic_density(number: int, name: str) -> Tensor:
    basis = Basis.build([number], name)
    x = torch.zeros(1, 3, dtype=torch.float64)
    overlap = integrals.overlap(basis, x)
    atom = Hamiltonian(
        overlap=overlap,
        root=inverse_root(overlap),
        kinetic=integrals.kinetic(basis, x),
        nuclear=integrals.nuclear(basis, x, torch.tensor([float(number)], dtype=torch.float64)),
        eri=integrals.eri([number], x, basis, "torch", max_memory_mb=64),
        hyb=1.0,
        repulsion=x.new_zeros(()),
        xc=None,
    )
    blocks = _blocks(basis)
    dm, diis = _occupy(number, atom.kinetic + atom.nuclear, atom.root, blocks), Diis()
    for _ in range(_CYCLES):
        fock, _ = atom.fock(dm)
        error = commutator(fock, dm, atom.overlap, atom.root)
        if float(error.abs().max()) < _TOLERANCE:
            break
        dm = _occupy(number, diis.extrapolate(fock, error), atom.root, blocks)
    return dm


def _blocks(basis: Basis) -> dict[int, list[Tensor]]:
    """For each l the functions of each m, whose shells mix only among themselves."""
    return {
        l: [basis.ao[basis.l == l] + m for m in range(2 * l + 1)] for l in (0, 1) if l in basis.l
    }


def _occupy(number: int, fock: Tensor, root: Tensor, blocks: dict[int, list[Tensor]]) -> Tensor:
    dm, left, used = torch.zeros_like(fock), number, {0: 0, 1: 0}
    for l, capacity in _SHELLS:
        n_electron = min(left, capacity)
        left -= n_electron
        for functions in blocks[l] if n_electron else ():
            square = functions[:, None], functions
            _, c = orbitals_of(fock[square], root[square])
            occupied = c[:, used[l]]
            dm[square] += n_electron / (2 * l + 1) * torch.outer(occupied, occupied)
        used[l] += 1
    return dm
