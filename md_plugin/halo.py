"""Halo: how the features of ghost atoms become known before an interaction layer.

    fill : (n_recv, n_feat) features of local atoms -> (n_send, n_feat), local atoms then ghosts

`fill` is linear and differentiable; its adjoint sums the gradients of all ghosts back into the
local atoms that own them. A model with L interaction layers calls it L - 1 times forward, and
autograd calls the adjoint as often, on every rank, also on one without atoms or pairs: whoever
returns early leaves the other ranks waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Halo(Protocol):
    """Anything that can tell the features of ghost atoms."""

    def fill(self, features: Tensor) -> Tensor:
        """(n_recv, n_feat) -> (n_send, n_feat), differentiable."""
        ...


@dataclass(frozen=True)
class NoHalo:
    """No ghosts: every sender is a local atom (ASE, batches, one periodic cell)."""

    def fill(self, features: Tensor) -> Tensor:
        """Returns the features unchanged."""
        return features


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
