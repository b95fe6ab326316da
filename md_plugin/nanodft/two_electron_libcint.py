"""Two-electron integrals by PySCF's libcint: the reference on the host.

`int2e_ip1` holds derivatives in the electron, (d_1 m n|k l): the derivative in the centre of the
first function is minus that. Gamma is symmetric in its four indices, so the three other centres
give the same again, and with E = 1/2 sum Gamma (mn|kl)

    dE/dA = -2 sum_{m on A} Gamma_mnkl (d_1 m n|k l)

It is streamed in blocks of shells m, n: the array (3, N, N, N, N) never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis


def eri(basis: Basis, positions: Tensor, max_memory: int) -> Tensor:
    """(n_ao (n_ao + 1) / 2,) * 2 integrals over unique products m >= n, in Hartree."""
    return torch.from_numpy(basis.mole(positions).intor("int2e", aosym="s4")).to(positions.device)


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""
    mole = basis.mole(positions)
    dm = dm.detach().cpu()
    first = [*basis.ao.tolist(), basis.n_ao]
    gradient = torch.zeros((basis.n_atom, 3), dtype=torch.float64)
    # of (3, m, n, k, l): the unique k >= l, then all of them
    n_pair = max(max_memory // (int(1.5 * 3 * 8) * basis.n_ao**2), 1)
    width = max(n_pair // basis.n_ao, 1)
    atoms = torch.repeat_interleave(basis.atom, 2 * basis.l + 1)
    for i0, i1 in _ranges(first, width):
        for j0, j1 in _ranges(first, max(n_pair // (first[i1] - first[i0]), 1)):
            i, j = slice(first[i0], first[i1]), slice(first[j0], first[j1])
            slope = _block_gradient(mole, (i0, i1, j0, j1), (dm, dm[i], dm[j], dm[i, j]), hyb)
            gradient.index_add_(0, atoms[i], slope.T)
    return gradient.to(positions)


def _ranges(first: list[int], width: int) -> list[tuple[int, int]]:
    """Consecutive shells with at most `width` functions together, or a single shell."""
    ranges, start = [], 0
    for shell in range(1, len(first)):
        if shell == len(first) - 1 or first[shell + 1] - first[start] > width:
            ranges.append((start, shell))
            start = shell
    return ranges


def _block_gradient(
    mole: Any, shells: tuple[int, int, int, int], dms: tuple[Tensor, ...], hyb: float
) -> Tensor:
    """(3, m) -2 sum_nkl Gamma (d_1 m n|k l) of one block; dms: D, and its rows m, n, and m n."""
    dm, dm_m, dm_n, dm_mn = dms
    kets = (0, mole.nbas) * 2
    unique = torch.from_numpy(mole.intor("int2e_ip1", shls_slice=(*shells, *kets), aosym="s2kl"))
    k, l = torch.tril_indices(len(dm), len(dm))
    gradient: Tensor = -2 * ((unique @ (dm[k, l] * (2.0 - (k == l).double()))) * dm_mn).sum(2)
    if hyb:
        # D_mk D_nl and D_ml D_nk give the same: (d_1 m n|k l) is symmetric in k, l
        values = unique.new_empty((*unique.shape[:-1], len(dm), len(dm)))
        values[..., k, l] = values[..., l, k] = unique
        half = (values @ dm_n[:, :, None]).squeeze(-1).sum(2)  # sum_nl (d_1 m n|k l) D_nl
        gradient += hyb * (half * dm_m).sum(2)
    return gradient
