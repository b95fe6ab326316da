"""Invariants of the tensors of HIP-HOP-NN, and the layer that mixes them.

Each feature of an atom has a scalar s, a vector v, a traceless symmetric matrix Q and a traceless
symmetric tensor T of third order. Their contractions without free index, named by the number n of
factors and the highest order l among them, are what the next layer sees:

    n = 1    s
    n = 2    v.v (l=1)    A_ii (2)    B_ii (3)
    n = 3    A:Q (2)      v.Q.v (2)   B:Q (3)
    n = 4    |Q.v|^2 (2)  B:B  T:vvv  v.B.v  B:A  |T:Q|^2 (3)          A = Q.Q,  B_km = T_ijk T_ijm

    out[i, b] = sum_{a, m} normalised(I)[i, m, a] mixing[m, a, b]

The normalisation takes each invariant of an atom over its features to zero mean and unit variance.
Allen, Shinkle, Bujack, Lubbers, "Optimal Invariant Bases for Atomistic Machine Learning",
arXiv:2503.23515 (2025); the set and its order are those of hippynn's HopInvariantLayer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class Tensors(NamedTuple):
    """Per atom and feature (...): the tensors in Cartesian form, and the two square ones."""

    s: Tensor  # (...)
    v: Tensor  # (..., 3)
    q: Tensor  # (..., 3, 3)
    t: Tensor  # (..., 3, 3, 3)
    a: Tensor  # (..., 3, 3)
    b: Tensor  # (..., 3, 3)

    @property
    def qv(self) -> Tensor:
        """Q.v (..., 3)."""
        return (self.q @ self.v[..., None])[..., 0]

    @property
    def vv(self) -> Tensor:
        """v v^T (..., 3, 3)."""
        return self.v[..., :, None] * self.v[..., None, :]


def _dot(x: Tensor, y: Tensor, order: int) -> Tensor:
    return (x * y).sum(dim=tuple(range(-order, 0)))


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _square(x: Tensor, order: int) -> Tensor:
    return _dot(x, x, order)


# (factors n, highest order l, the invariant), in hippynn's order.
INVARIANTS: tuple[tuple[int, int, Callable[[Tensors], Tensor]], ...] = (
    (1, 0, lambda x: x.s),
    (2, 1, lambda x: _square(x.v, 1)),
    (2, 2, lambda x: _trace(x.a)),
    (3, 2, lambda x: _dot(x.a, x.q, 2)),
    (2, 3, lambda x: _trace(x.b)),
    (4, 3, lambda x: _square(x.b, 2)),
    (3, 2, lambda x: _dot(x.qv, x.v, 1)),
    (4, 2, lambda x: _square(x.qv, 1)),
    (4, 3, lambda x: _dot(x.t, x.v[..., None, None] * x.vv[..., None, :, :], 3)),
    (4, 3, lambda x: _dot(x.b, x.vv, 2)),
    (3, 3, lambda x: _dot(x.b, x.q, 2)),
    (4, 3, lambda x: _dot(x.b, x.a, 2)),
    (4, 3, lambda x: _square(_dot(x.t, x.q[..., None, :, :], 2), 1)),
)


def chosen_invariants(n_max: int, order: int) -> list[Callable[[Tensors], Tensor]]:
    """Those with at most n_max factors of tensors up to `order`."""
    return [invariant for n, l, invariant in INVARIANTS if n <= n_max and l <= order]


def monomials(order: int) -> list[tuple[int, ...]]:
    """Index tuples x <= y <= z of the products of `order` Cartesian components."""
    if order == 0:
        return [()]
    return [(*m, k) for m in monomials(order - 1) for k in range(m[-1] if m else 0, 3)]


def traceless_basis(order: int) -> Tensor:
    """(3^order, 2 order + 1) float64: traceless symmetric tensor of given independent components.

    Independent are those whose index tuple does not end with zz; the others follow from the trace.
    """
    free = [m for m in monomials(order) if m[-2:] != (2, 2)]
    column = {m: k for k, m in enumerate(free)}

    def row(index: tuple[int, ...]) -> Tensor:
        index = tuple(sorted(index))
        if index in column:
            return torch.eye(len(free), dtype=torch.float64)[column[index]]
        return -row((*index[:-2], 0, 0)) - row((*index[:-2], 1, 1))

    return torch.stack(
        [
            row(tuple(i))
            for i in torch.cartesian_prod(*[torch.arange(3)] * order).reshape(-1, order).tolist()
        ]
    )


def projection(order: int) -> Tensor:
    """(n_monomials, 2 order + 1) float64: monomials of a vector -> components of its tensor.

    The orthogonal projection of r r ... r onto traceless symmetric tensors.
    """
    inverse = torch.linalg.pinv(traceless_basis(order)).T.reshape(*[3] * order, -1)
    return torch.stack(
        [
            sum(
                (inverse[index] for index in set(permutations(m))),
                torch.zeros(2 * order + 1).double(),
            )
            for m in monomials(order)
        ]
    )


def monomials_of_components(order: int) -> Tensor:
    """(n_monomials, (order + 1)^2) float64: what a unit vector's tensors say of its monomials.

    x_i x_j = Q_ij + d_ij / 3;   x_i x_j x_k = T_ijk + (d_ij x_k + d_ik x_j + d_jk x_i) / 5
    """
    basis = traceless_basis(order).reshape(*[3] * order, -1)
    rows = torch.zeros(len(monomials(order)), (order + 1) ** 2, dtype=torch.float64)
    for row, index in zip(rows, monomials(order), strict=True):
        row[order**2 :] = basis[index]
        for k, l in combinations(range(order), 2):
            if index[k] == index[l]:
                rest = [index[m] for m in range(order) if m not in (k, l)]
                row[1 + rest[0] if rest else 0] += 1.0 / (2 * order - 1)
    return rows


class InvariantMixing(nn.Module):
    """Tensors of each feature -> their invariants, normalised and mixed.

    Args:
        n_feat: features in and out.
        n_max: factors of an invariant, at most.
        order: highest tensor order.
        norm_eps: epsilon of the normalisation; None leaves it out.
    """

    basis_2: Tensor
    basis_3: Tensor

    def __init__(self, n_feat: int, n_max: int, order: int, norm_eps: float | None):
        super().__init__()
        self.n_max, self.order, self.norm_eps = n_max, order, norm_eps
        n_invariants = len(chosen_invariants(n_max, order))
        self.mixing = nn.Parameter(torch.empty(n_invariants, n_feat, n_feat))
        nn.init.normal_(self.mixing, std=(1.0 / (n_invariants * n_feat)) ** 0.5)
        if norm_eps is not None:
            self.norm_weight = nn.Parameter(torch.ones(n_invariants, n_feat))
            self.norm_bias = nn.Parameter(torch.zeros(n_invariants, n_feat))
        self.register_buffer("basis_2", traceless_basis(2).T, persistent=False)
        self.register_buffer("basis_3", traceless_basis(3).T, persistent=False)

    def forward(self, components: Tensor) -> Tensor:
        """Components (n, 1 | 4 | 9 | 16, n_feat) of the tensors -> (n, n_feat)."""
        tensors = self._cartesian(components.transpose(1, 2))
        chosen = chosen_invariants(self.n_max, self.order)
        found = torch.stack([invariant(tensors) for invariant in chosen], dim=1)
        if self.norm_eps is not None:
            found = layer_norm(found, found.shape[2:], eps=self.norm_eps)
            found = found * self.norm_weight + self.norm_bias
        n_mixed = prod(self.mixing.shape[:2])
        return found.reshape(-1, n_mixed) @ self.mixing.reshape(n_mixed, -1)

    def _cartesian(self, components: Tensor) -> Tensors:
        none = components[..., :0]
        s, v, q, t = components[..., 0], components[..., 1:4], none, none
        a = b = none
        lead = components.shape[:2]
        if self.order >= 2:
            q = (components[..., 4:9] @ self.basis_2).reshape(*lead, 3, 3)
            a = q @ q
        if self.order >= 3:
            flat = components[..., 9:16] @ self.basis_3
            t = flat.reshape(*lead, 3, 3, 3)
            b = flat.reshape(*lead, 9, 3).transpose(-1, -2) @ flat.reshape(*lead, 9, 3)
        return Tensors(s, v, q, t, a, b)
