"""LammpsHalo: features of ghost atoms over LAMMPS's communication, as one autograd Function.

    forward    rows of local atoms -> rows of all senders        forward_exchange
    backward   gradients of all senders -> local atoms, summed   reverse_exchange (its adjoint)

Every rank calls both equally often, also one without atoms or pairs.

Where LAMMPS is on the host and the network on a GPU, rows go through page-locked memory: down go
the rows that LAMMPS reads, the host waits for them once, and up go the rows that it has filled.

    fill       down n_recv rows, up n_send - n_recv       adjoint    the other way round
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lammps_interface import couplings
from md_plugin import devices
from md_plugin.devices import Staging


@dataclass(frozen=True, eq=False)
class LammpsHalo:
    """Ghosts are known by LAMMPS.

    Attributes:
        data: LAMMPS's data object, with forward_exchange and reverse_exchange.
        n_recv: number of receivers.
        device: where LAMMPS's arrays, and so the exchanged rows, live.
        order: (n_send,) atom index in LAMMPS of each sender, on `device`; None where sender k is
            atom k.
        staging: memory for a network on another device; None where it is on `device`.
    """

    data: Any
    n_recv: int
    device: torch.device
    order: Tensor | None = None
    staging: Staging | None = None

    def fill(self, features: Tensor) -> Tensor:
        """(n_recv, n_feat) -> (n_send, n_feat); see `md_plugin.halo.Halo`."""
        return cast(Tensor, _Fill.apply(features, self))  # type: ignore[no-untyped-call]

    def adjoint(self, rows: Tensor) -> Tensor:
        """(n_send, n_feat) -> (n_recv, n_feat); see `md_plugin.halo.Halo`."""
        if self.staging is not None and self.order is None:
            host = self._lower(rows, slice(self.n_recv, len(rows)))
            host[: self.n_recv] = 0.0
            self.data.reverse_exchange(host, host, host.shape[1])
            return self.staging.leave(host[: self.n_recv]).add_(rows[: self.n_recv])
        full = self.all_rows(rows)
        _exchange(self.data.reverse_exchange, full)
        return self.sender_rows(full, self.n_recv).to(rows.device)

    def filled(self, rows: Tensor) -> Tensor:
        """`fill`, outside of autograd."""
        if self.staging is not None and self.order is None:
            host = self._lower(rows, slice(0, self.n_recv))
            self.data.forward_exchange(host, host, host.shape[1])
            filled = rows.new_empty(host.shape)
            filled[: self.n_recv] = rows
            self.staging.leave(host[self.n_recv :], filled[self.n_recv :])
            return filled
        full = self.all_rows(rows)
        _exchange(self.data.forward_exchange, full)
        return self.sender_rows(full, self.n_send).to(rows.device)

    def _lower(self, rows: Tensor, part: slice) -> Tensor:
        """Host memory for all atoms of LAMMPS, with that part of the rows in it."""
        assert self.staging is not None
        host = self.staging.room((self.data.ntotal, rows.shape[1]), rows.dtype)
        host[part].copy_(rows[part], non_blocking=True)
        devices.wait(rows.device)
        return host

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
        return halo.filled(features.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.halo.adjoint(gradient), None


def _exchange(exchange: Any, full: Tensor) -> None:
    """In place. LAMMPS's KOKKOS coupling works on its own stream: both sides wait."""
    couplings.fence(full.device)
    exchange(full, full, full.shape[1])
    couplings.fence(full.device)


def check_exchange(data: Any, device: torch.device, width: int) -> int:
    """Sends a known tensor through LAMMPS's exchange, both ways. Every rank calls it.

    Forward, ghosts must receive what LAMMPS knows of them anyway: their global ids, or their
    elements where atoms have no ids. Back, an owner receives as many copies of its own value as
    it receives ones; summed over all ranks, these are the local and ghost atoms of all ranks.

    Args:
        data: LAMMPS's data object.
        device: where LAMMPS's arrays live.
        width: features per atom, float64.

    Returns:
        How many ones have arrived on this rank, its own included.

    Raises:
        RuntimeError: the exchange delivers something else.
    """
    couplings.fence(device)
    known = getattr(data, "tag", None)
    known = data.elems if known is None and data.ntotal else known
    if known is None or not data.ntotal:
        known = torch.empty(0)
    column = torch.as_tensor(known, device=device).double()[:, None] + 1
    expected = column * torch.arange(1, width + 1, device=device, dtype=torch.float64)
    halo = LammpsHalo(data, int(data.nlocal), device)
    found = halo.fill(expected[: halo.n_recv])
    if not torch.equal(found, expected):
        n_bad = int((found != expected).any(dim=1).sum())
        raise RuntimeError(
            f"LAMMPS's exchange of features is broken here: {n_bad} of {halo.n_send} atoms "
            "received another atom's values. Check that mpirun, LAMMPS and Python use one and the "
            "same MPI library (md-plugin doctor)"
        )
    copies, back = halo.adjoint(torch.ones_like(expected)), halo.adjoint(expected)
    if not torch.equal(back, copies * expected[: halo.n_recv]) or bool((copies < 1).any()):
        raise RuntimeError(
            "LAMMPS's exchange of features is broken here: what ghosts send back does not arrive "
            "at their owners (md-plugin doctor)"
        )
    return int(copies[:, 0].sum())
