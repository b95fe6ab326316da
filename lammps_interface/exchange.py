"""LammpsHalo: features of ghost atoms over LAMMPS's communication, as one autograd Function.

    forward    rows of local atoms -> rows of all senders        forward_exchange
    backward   gradients of all senders -> local atoms, summed   reverse_exchange (its adjoint)

Every rank calls both equally often, also one without atoms or pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LammpsHalo:
    """Ghosts are known by LAMMPS.

    Attributes:
        data: LAMMPS's data object, with forward_exchange and reverse_exchange.
        n_recv: number of receivers.
        device: where LAMMPS's arrays, and so the exchanged rows, live.
        order: (n_send,) atom index in LAMMPS of each sender, on `device`; None where sender k is
            atom k.
    """

    data: Any
    n_recv: int
    device: torch.device
    order: Tensor | None = None

    def fill(self, features: Tensor) -> Tensor:
        """(n_recv, n_feat) -> (n_send, n_feat); see `md_plugin.halo.Halo`."""
        return cast(Tensor, _Fill.apply(features, self))  # type: ignore[no-untyped-call]

    def all_rows(self, rows: Tensor) -> Tensor:
        """Rows of the first senders -> contiguous rows of all atoms of LAMMPS, zero elsewhere."""
        full = torch.zeros(self.data.ntotal, rows.shape[1], dtype=rows.dtype, device=self.device)
        if self.order is None:
            full[: rows.shape[0]] = rows
        else:
            full[self.order[: rows.shape[0]]] = rows.to(self.device)
        return full

    def sender_rows(self, full: Tensor, count: int) -> Tensor:
        """Rows of all atoms of LAMMPS -> rows of the first `count` senders."""
        return full[:count] if self.order is None else full[self.order[:count]]

    @property
    def n_send(self) -> int:
        """Number of senders."""
        return int(self.data.ntotal) if self.order is None else self.order.numel()


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, halo: LammpsHalo) -> Tensor:
        ctx.halo = halo
        full = halo.all_rows(features.detach())
        _exchange(halo.data.forward_exchange, full)
        return halo.sender_rows(full, halo.n_send).to(features.device)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        halo: LammpsHalo = ctx.halo
        full = halo.all_rows(gradient)
        _exchange(halo.data.reverse_exchange, full)
        return halo.sender_rows(full, halo.n_recv).to(gradient.device), None


def _exchange(exchange: Any, full: Tensor) -> None:
    """In place. LAMMPS's KOKKOS coupling works on its own stream: both sides wait."""
    if full.is_cuda:
        torch.cuda.synchronize(full.device)
    exchange(full, full, full.shape[1])
    if full.is_cuda:
        torch.cuda.synchronize(full.device)
