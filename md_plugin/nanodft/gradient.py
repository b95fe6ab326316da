"""Nuclear gradient at the self-consistent density, without differentiating through the SCF.

The energy is stationary in the orbitals, so only what depends on the positions directly is moved,
at constant density D and energy-weighted density W (Pulay, Mol. Phys. 17, 197 (1969)):

    L(R)  = Tr D h + sum Gamma_ijkl (ij|kl) + E_xc[D; chi(R), grid(R)] + E_nn - Tr W S
    dE/dR = dL/dR at constant D and W,         Gamma_ijkl = D_ij D_kl / 2 - hyb/4 D_ik D_jl

One-electron terms are differentiated by autograd, the two-electron term by the backend's kernels,
which never hold an array of derivatives, E_xc in chunks of grid points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from md_plugin.nanodft import integrals
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.scf import State


def nuclear_repulsion(charges: Tensor, x: Tensor) -> Tensor:
    """(...) sum_{i<j} Z_i Z_j / |R_i - R_j|, Ha; differentiable in x (..., n_atom, 3), bohr."""
    i, j = torch.triu_indices(len(charges), len(charges), 1, device=x.device)
    apart = (x[..., i, :] - x[..., j, :]).norm(dim=-1)
    energy: Tensor = (charges[i] * charges[j] / apart).sum(-1)
    return energy


def one_electron_gradient(basis: Basis, charges: Tensor, x: Tensor, state: State) -> Tensor:
    """(..., n_atom, 3) gradient of Tr D h + E_nn - Tr W S at constant D and W, Ha/bohr."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        core = integrals.kinetic(basis, x) + integrals.nuclear(basis, x, charges)
        lagrangian = (state.dm * core).sum() + nuclear_repulsion(charges, x).sum()
        lagrangian = lagrangian - (state.energy_weighted_dm * integrals.overlap(basis, x)).sum()
        (gradient,) = torch.autograd.grad(lagrangian, x)
    return gradient
