"""Pairs: which sender each receiver sees, as frozen compressed sparse rows (CSR).

Row ``i`` holds the pairs ``row_ptr[i] : row_ptr[i + 1]`` of receiver ``i``; ``sender[p]`` is the
other atom of pair ``p``. Receivers are the senders ``0 .. n_recv - 1``: local atoms come first,
ghost atoms after them, and ghosts own no row. The list is rectangular (n_recv <= n_send).

A `Pairs` is built once per neighbour list and passed to every kernel. What is derived from it
(`receiver`, and the transpose by sender `col_ptr`, `perm`) is computed on first use and kept in
the object, so that no kernel call ever sorts. Pairs beyond the cutoff, the skin of a reused list,
may be present: the cutoff function gives them exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_PAIRS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Pairs:
    """CSR neighbour pairs by receiver.

    Attributes:
        row_ptr: (n_recv + 1,) int32, start of each receiver's row.
        sender: (n_pair,) int32, index of the sender of each pair, below `n_send`.
        n_send: number of senders (local and ghost atoms).
    """

    row_ptr: Tensor
    sender: Tensor
    n_send: int

    def __post_init__(self) -> None:
        if self.row_ptr.dtype != torch.int32 or self.sender.dtype != torch.int32:
            raise TypeError(
                f"row_ptr and sender must be int32, got {self.row_ptr.dtype} and "
                f"{self.sender.dtype}; Pairs.from_edges converts any integer edge list"
            )
        if self.row_ptr.ndim != 1 or self.sender.ndim != 1 or self.row_ptr.numel() == 0:
            raise ValueError("row_ptr must have shape (n_recv + 1,) and sender (n_pair,)")
        if self.row_ptr.device != self.sender.device:
            raise ValueError(f"row_ptr is on {self.row_ptr.device}, sender on {self.sender.device}")
        # Kernels read indices through pointers; an engine may hand over a column of a table.
        object.__setattr__(self, "row_ptr", self.row_ptr.contiguous())
        object.__setattr__(self, "sender", self.sender.contiguous())
        # On a GPU the look at the last entry would make the host wait.
        if self.device.type == "cpu" and int(self.row_ptr[-1]) != self.n_pair:
            raise ValueError(
                f"row_ptr ends at {int(self.row_ptr[-1])}, but there are {self.n_pair} senders"
            )
        if self.n_recv > self.n_send:
            raise ValueError(
                f"{self.n_recv} receivers but only {self.n_send} senders: receivers are the "
                "senders 0 .. n_recv - 1"
            )

    @property
    def n_recv(self) -> int:
        """Number of receivers."""
        return self.row_ptr.numel() - 1

    @property
    def n_pair(self) -> int:
        """Number of pairs."""
        return self.sender.numel()

    @property
    def device(self) -> torch.device:
        """Device that holds the index arrays."""
        return self.sender.device

    @cached_property
    def _is_mutual(self) -> bool:
        there, back = self.receiver.long() * self.n_send, self.sender.long() * self.n_send
        there, back = there + self.sender, back + self.receiver
        return bool(torch.equal(there.sort().values, back.sort().values))

    def check_mutual(self) -> None:
        """Raise ValueError unless each pair of receivers is there both ways; ghosts have no rows.

        Looks once; on a GPU the host waits for it.
        """
        if self.n_recv == self.n_send and not self._is_mutual:
            raise ValueError(
                "some pair i -> j of the list has no pair j -> i, which forces without atomics "
                "need: give all neighbours of each atom, or turn "
                "torch.use_deterministic_algorithms off"
            )

    @cached_property
    def receiver(self) -> Tensor:
        """(n_pair,) int64, the receiver of each pair."""
        rows = torch.arange(self.n_recv, device=self.device)
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        return torch.repeat_interleave(rows, counts, output_size=self.n_pair)

    @cached_property
    def sender_long(self) -> Tensor:
        """(n_pair,) int64 copy of `sender`, for torch operations that take no int32 index."""
        return self.sender.long()

    @cached_property
    def _transpose(self) -> tuple[Tensor, Tensor]:
        perm = torch.argsort(self.sender, stable=True)
        counts = torch.bincount(self.sender_long, minlength=self.n_send)
        return _offsets(counts), perm.int()

    @property
    def col_ptr(self) -> Tensor:
        """(n_send + 1,) int32, start of each sender's block in `perm`."""
        return self._transpose[0]

    @property
    def perm(self) -> Tensor:
        """(n_pair,) int32, pair indices grouped by sender, in ascending order per sender."""
        return self._transpose[1]

    @classmethod
    def from_edges(
        cls, receiver: Tensor, sender: Tensor, n_recv: int, n_send: int
    ) -> tuple[Pairs, Tensor]:
        """Sort any edge list into rows.

        Args:
            receiver: (n_pair,) any integer type, values in [0, n_recv).
            sender: (n_pair,) any integer type, values in [0, n_send).
            n_recv: number of receivers.
            n_send: number of senders, at least n_recv.

        Returns:
            The pairs, and the permutation (n_pair,) int64 that sorts per-pair data:
            ``data[perm]`` is in the order of the pairs. The order within a row is kept.

        Raises:
            TypeError: if the indices are not integers.
            ValueError: if the shapes differ, an index is out of range, or there are more pairs
                than int32 can index.
        """
        receiver, sender = torch.as_tensor(receiver), torch.as_tensor(sender)
        for name, index in (("receiver", receiver), ("sender", sender)):
            # An empty list becomes an empty float tensor; that is fine.
            if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
                raise TypeError(f"{name} must hold integer indices, got {index.dtype}")
        if receiver.shape != sender.shape or receiver.ndim != 1:
            raise ValueError(
                f"receiver and sender must both have shape (n_pair,), got "
                f"{tuple(receiver.shape)} and {tuple(sender.shape)}"
            )
        if receiver.numel() > MAX_PAIRS:
            raise ValueError(f"{receiver.numel()} pairs; int32 indices reach {MAX_PAIRS}")
        for name, index, size in (("receiver", receiver, n_recv), ("sender", sender, n_send)):
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
                raise ValueError(
                    f"{name} indices span {int(index.min())} .. {int(index.max())}, "
                    f"but must lie in [0, {size})"
                )
        receiver = receiver.long()
        perm = torch.argsort(receiver, stable=True)
        row_ptr = _offsets(torch.bincount(receiver, minlength=n_recv))
        return cls(row_ptr, sender[perm].int().contiguous(), n_send), perm

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device; itself where it already is there."""
        sender = self.sender.to(device)
        if sender is self.sender:
            return self
        return Pairs(self.row_ptr.to(device), sender, self.n_send)

    def __repr__(self) -> str:
        return (
            f"Pairs(n_recv={self.n_recv}, n_send={self.n_send}, n_pair={self.n_pair}, "
            f"device={str(self.device)!r})"
        )


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where atoms are, and the pairs between them; pairs beyond the cutoff may be among them.

    Attributes:
        x: (n_send, 3) float64, Å.
        pairs: who sees whom.
        translation: (n_pair,) int16, the row of `translations` that is added to the sender; None
            where ghosts stand at their own places.
        translations: (n_translation, 3) float64 periodic shifts, Å; None likewise.
    """

    x: Tensor
    pairs: Pairs
    translation: Tensor | None = None
    translations: Tensor | None = None

    def to(self, device: torch.device | str) -> Geometry:
        """The same on another device; what already is there is not copied."""
        image = None if self.translation is None else self.translation.to(device)
        shifts = None if self.translations is None else self.translations.to(device)
        return Geometry(self.x.to(device), self.pairs.to(device), image, shifts)

    def r_ij(self) -> Tensor:
        """(n_pair, 3) float64, x[sender] - x[receiver] + periodic shift, Å."""
        shift = None
        if self.translation is not None and self.translations is not None:
            shift = self.translations.index_select(0, self.translation.int())
        return pair_vectors(self.x, self.pairs, shift)


def pair_vectors(x: Tensor, pairs: Pairs, shift: Tensor | None) -> Tensor:
    """r_ij = x[sender] - x[receiver] (+ shift), (n_pair, 3)."""
    sent = x.index_select(0, pairs.sender_long).sub_(x.index_select(0, pairs.receiver))
    return sent if shift is None else sent.add_(shift)


def rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """(n, 3) rows, (n, 3, 3) matrices -> (n, 3), each row times its matrix."""
    return torch.bmm(rows[:, None, :], matrices)[:, 0]


def _offsets(counts: Tensor) -> Tensor:
    """(n,) counts -> (n + 1,) int32 exclusive prefix sums."""
    ptr = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    ptr[1:] = torch.cumsum(counts, 0)
    return ptr
