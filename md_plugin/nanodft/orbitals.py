"""Basis functions and their derivatives at points in space, as a few matrix products.

    chi = Y u_0,    Y = 1 or d_x, d_y, d_z,    d = r - A
    u_m = sum_k c_k (-2 a_k)^m exp(-a_k d^2)

A Gaussian's derivative brings down -2 a d, so with the constants Y_j = dY/dd_j (0 or 1)

    chi_j  = Y_j u_0 + Y d_j u_1
    chi_jk = (Y_j d_k + Y_k d_j + delta_jk Y) u_1 + Y d_j d_k u_2

Order and normalisation are those of `Basis`; lengths in bohr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis


@dataclass(frozen=True, eq=False)
class Orbitals:
    """All functions of a basis set as columns of tables.

    Attributes:
        atom: (n_ao,) the atom of each function.
        component: (n_ao,) 0 for Y = 1, and 1, 2, 3 for Y = d_x, d_y, d_z.
        exponents: (n_prim,) 1/bohr^2, those of all shells; where s and p share one, once.
        centre: (n_prim,) the atom of each.
        contraction: (n_prim, n_ao) coefficients c_k.
    """

    atom: Tensor
    component: Tensor
    exponents: Tensor
    centre: Tensor
    contraction: Tensor

    @classmethod
    def of(cls, basis: Basis, device: torch.device | str = "cpu") -> Orbitals:
        """The tables of a basis, on a device."""
        n_prim = torch.tensor([len(a) for a in basis.exponents])
        n_fun = 2 * basis.l + 1
        contraction = torch.zeros(int(n_prim.sum()), basis.n_ao, dtype=torch.float64)
        start = 0
        for shell, coefficients in enumerate(basis.coefficients):
            stop = start + len(coefficients)
            first = int(basis.ao[shell])
            contraction[start:stop, first : first + int(n_fun[shell])] = coefficients[:, None]
            start = stop
        rows = torch.stack([basis.atom.repeat_interleave(n_prim), torch.cat(basis.exponents)], 1)
        rows, shared = torch.unique(rows, dim=0, return_inverse=True)
        components = [torch.arange(1, 4) if l else torch.tensor([0]) for l in basis.l]
        tables = (
            basis.atom.repeat_interleave(n_fun),
            torch.cat(components),
            rows[:, 1].contiguous(),
            rows[:, 0].long(),
            contraction.new_zeros(len(rows), basis.n_ao).index_add(0, shared, contraction),
        )
        return cls(*(table.to(device) for table in tables))

    def at(self, points: Tensor, x: Tensor, derivatives: int) -> Values:
        """Functions of atoms at x (..., n_atom, 3) at points (..., n, 3), bohr.

        Args:
            points: where.
            x: positions of the atoms.
            derivatives: 0, 1 or 2, the highest that will be asked of the result.
        """
        d = points[..., None, :] - x[..., None, :, :]
        decay = (-self.exponents * d.square().sum(-1)[..., self.centre]).exp()
        radial = []
        for m in range(derivatives + 1):
            radial.append(decay @ (self.contraction * (-2 * self.exponents[:, None]) ** m))
        d = d.movedim(-1, 0)
        powers = torch.cat([torch.ones_like(d[:1]), d])
        polynomial = powers[self.component, ..., self.atom].movedim(0, -1)
        constants = (self.component == torch.arange(1, 4, device=d.device)[:, None]).double()
        constants = constants.view(3, *[1] * (d.dim() - 2), -1)
        shifts = d[..., self.atom] if derivatives else d[..., :0]
        return Values(polynomial, constants, shifts, tuple(radial))


@dataclass(frozen=True, eq=False)
class Values:
    """Factors of the module's equations at n points of one geometry, or of many (...).

    Attributes:
        polynomial: (..., n, n_ao) Y.
        constants: (3, ..., 1, n_ao) Y_j.
        shifts: (3, ..., n, n_ao) d_j.
        radial: u_0, u_1 ..., (..., n, n_ao) each.
    """

    polynomial: Tensor
    constants: Tensor
    shifts: Tensor
    radial: tuple[Tensor, ...]

    @property
    def chi(self) -> Tensor:
        """(..., n, n_ao) values, bohr^(-3/2)."""
        return self.polynomial * self.radial[0]

    @property
    def gradient(self) -> Tensor:
        """(3, ..., n, n_ao) derivatives chi_j, bohr^(-5/2)."""
        slope = self.polynomial * self.radial[1]
        return torch.addcmul(self.shifts * slope, self.constants, self.radial[0])

    @property
    def tables(self) -> Tensor:
        """(4, ..., n, n_ao) chi and its three derivatives."""
        return torch.cat([self.chi[None], self.gradient])

    def pull(self, of_chi: Tensor, of_gradient: Tensor | None) -> Tensor:
        """(3, ..., n, n_ao) slope of a scalar as functions' d move: of_chi chi_k + of_j chi_jk.

        Args:
            of_chi: (..., n, n_ao) derivatives of the scalar with respect to chi.
            of_gradient: (3, ..., n, n_ao) with respect to chi_j; None where it has none of them.
        """
        y, u = self.polynomial, self.radial
        if of_gradient is None:
            return of_chi * self.gradient
        along = (of_gradient * self.shifts).sum(0)
        constant = (of_gradient * self.constants).sum(0)
        radial_part = constant * u[1] + y * (along * u[2] + of_chi * u[1])
        angular_part = along * u[1] + of_chi * u[0]
        pull = self.shifts * radial_part
        pull.addcmul_(self.constants, angular_part)
        return pull.addcmul_(of_gradient, y * u[1])
