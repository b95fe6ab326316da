"""Halo: how the features of ghost atoms become known before an interaction layer.

    fill    : (n_recv, n_feat) features of local atoms -> (n_send, n_feat), local atoms then ghosts
    adjoint : (n_send, n_feat) -> (n_recv, n_feat), adds the rows of all ghosts to their owners'

`fill` is linear and differentiable; autograd's backward of it is `adjoint`. A model with L
interaction layers calls it L - 1 times forward, and autograd calls the adjoint as often, on every
rank, also on one without atoms or pairs: whoever returns early leaves the other ranks waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from md_plugin.pairs import Pairs


class Halo(Protocol):
    """Anything that can tell the features of ghost atoms."""

    def fill(self, features: Tensor) -> Tensor:
        """(n_recv, n_feat) -> (n_send, n_feat), differentiable."""
        ...

    def adjoint(self, rows: Tensor) -> Tensor:
        """(n_send, n_feat) -> (n_recv, n_feat), outside of autograd."""
        ...


def check_filled(rows: Tensor, pairs: Pairs) -> Tensor:
    """The rows, one for each sender of the pairs.

    Raises:
        ValueError: there are fewer: ghosts of which nothing is known.
    """
    if rows.shape[0] != pairs.n_send:
        raise ValueError(
            f"{pairs.n_send - pairs.n_recv} ghost atoms, but the features of "
            f"{rows.shape[0] - pairs.n_recv} are known: models with several interaction layers "
            "need a halo that fills them"
        )
    return rows


@dataclass(frozen=True)
class NoHalo:
    """No ghosts: every sender is a local atom (ASE, batches, one periodic cell)."""

    def fill(self, features: Tensor) -> Tensor:
        """Returns the features unchanged."""
        return features

    def adjoint(self, rows: Tensor) -> Tensor:
        """Returns the rows unchanged."""
        return rows


@dataclass(frozen=True, eq=False)
class IndexHalo:
    """Ghosts are copies of local atoms of this process.

    Attributes:
        owner: (n_ghost,) int64, the local atom that each ghost copies.
    """

    owner: Tensor

    def fill(self, features: Tensor) -> Tensor:
        """Appends the owners' rows; autograd's adjoint of the gather sums them back."""
        return torch.cat([features, features.index_select(0, self.owner)])

    def adjoint(self, rows: Tensor) -> Tensor:
        """Adds the rows of ghosts to their owners' rows."""
        n_recv = rows.shape[0] - self.owner.numel()
        return rows[:n_recv].index_add(0, self.owner, rows[n_recv:])


class MomentHalo:
    """Gradients of B = sum_i x_i E_i, with x one component of the positions, across a halo.

    A ghost and its owner are the same atom at different places, so that a gradient of B must not
    simply be added to the owner's. What can be sent is the moment about the atom's own place,
    D = dB/dz - x dE/dz: it does not depend on the origin. The backward pass of the energy comes
    first (`axis` is None) and leaves dE/dz here; after that, passes with `axis` 0, 1, 2 are those
    of B. Each costs one adjoint per layer, on every rank.

    Args:
        halo: fills the features.
        positions: (n_send, 3), Å.
    """

    def __init__(self, halo: Halo, positions: Tensor):
        self.halo, self.positions = halo, positions
        self.axis: int | None = None
        self._gradients: list[tuple[Tensor, Tensor] | None] = []

    @property
    def n_exchanges(self) -> int:
        """How often features were filled."""
        return len(self._gradients)

    def fill(self, features: Tensor) -> Tensor:
        """See `Halo`."""
        self._gradients.append(None)
        filled: Tensor = _MomentFill.apply(  # type: ignore[no-untyped-call]
            features, self, len(self._gradients) - 1
        )
        return filled

    def adjoint(self, rows: Tensor) -> Tensor:
        """See `Halo`."""
        return self.halo.adjoint(rows)

    def backward(self, rows: Tensor, exchange: int) -> Tensor:
        """Gradient of E, or of B where `axis` is set, through the fill of that number."""
        if self.axis is None:
            back = self.halo.adjoint(rows)
            self._gradients[exchange] = rows, back
            return back
        known = self._gradients[exchange]
        assert known is not None, "the energy comes first"
        x = self.positions[:, self.axis, None].to(rows.dtype)
        moment = self.halo.adjoint(rows - x * known[0])
        return moment + x[: moment.shape[0]] * known[1]


class _MomentFill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, halo: MomentHalo, exchange: int) -> Tensor:
        ctx.halo, ctx.exchange = halo, exchange
        filled = halo.halo.fill(features.detach())
        return filled.clone() if filled.shape == features.shape else filled

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None, None]:
        return ctx.halo.backward(rows, ctx.exchange), None, None
