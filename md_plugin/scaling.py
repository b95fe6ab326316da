"""A cost model of molecular dynamics on many ranks: ghosts, bytes, messages, time of a step.

A rank owns a sub-box of sides L_k with n atoms at density rho, and needs all atoms within h =
rcut + skin around it, as ghosts (Plimpton, J. Comput. Phys. 117, 1 (1995)):

    ghosts    g = rho (prod_k (L_k + 2 h) - prod_k L_k)                                 `ghosts`
    messages  6 per exchange; 2 ceil(h / L_k) in each direction where sub-boxes are thin `swaps`
    features  each layer but the first: g w bytes forward (z) and as many back (dE/dz)   `traffic`
    time      T = T_0 + t_atom n + t_ghost g + X (latency swaps + g w / bandwidth)       `step`

with w = bytes of the features of an atom and X = 2 (layers - 1) exchanges. Without an exchange,
ghosts of `layers` cutoffs are needed, and layer l is computed on all atoms that later layers see
within (layers - l) cutoffs (`recompute`).

Everything here is arithmetic. What is measured, fitted or assumed is decided by who calls it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INT32 = 2**31 - 1
NEIGHMASK = 2**29 - 1  # of LAMMPS's lmptype.h: what its neighbour lists can number


@dataclass(frozen=True)
class Workload:
    """A network, as far as costs go.

    Attributes:
        name: as in tables.
        layers: interaction layers.
        width: features per atom in an exchange.
        rcut: cutoff, Å.
        skin: of the neighbour list, Å.
        density: atoms per Å^3.
        itemsize: bytes of a feature.
    """

    name: str
    layers: int
    width: int
    rcut: float
    skin: float
    density: float
    itemsize: int = 4

    @property
    def halo(self) -> float:
        """Width of the ghost region, Å."""
        return self.rcut + self.skin

    @property
    def exchanges(self) -> int:
        """Exchanges of features in a step, both directions together."""
        return 2 * (self.layers - 1)

    @property
    def neighbours(self) -> float:
        """Pairs of an atom in the list, skin included."""
        return 4 / 3 * math.pi * self.halo**3 * self.density


@dataclass(frozen=True)
class Machine:
    """What a rank computes on; times in s, bandwidths in bytes/s.

    Attributes:
        floor: of a step, whatever its size.
        atom: of an atom and step.
        latency: of a message.
        bandwidth: to ranks of the same node.
        ghost: of a ghost atom and step, exchanges not included.
        network: to other nodes, per rank; None: as within the node.
        node: ranks of a node.
    """

    floor: float
    atom: float
    latency: float
    bandwidth: float
    ghost: float = 0.0
    network: float | None = None
    node: int = 8

    def link(self, ranks: int) -> float:
        """Bytes/s of the ghost rows of a rank.

        Beyond a node three of the six faces of a sub-box lie inside it, and both kinds of link
        work at once: the slower half counts.
        """
        if self.network is None or ranks <= self.node:
            return self.bandwidth
        return min(2 * self.network, 2 * self.bandwidth)


@dataclass(frozen=True)
class Step:
    """What a step costs a rank: s, and bytes of features, both directions together."""

    local: float
    ghosts: float
    bytes: float
    compute: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exchange


def cube(atoms: float, density: float) -> tuple[float, float, float]:
    """Sides (Å) of the cubic sub-box of so many atoms."""
    return ((atoms / density) ** (1 / 3),) * 3


def ghosts(sides: Sequence[float], density: float, halo: float) -> float:
    """g, the atoms within `halo` around a box of these sides (Å): rho (prod (L + 2 h) - prod L)."""
    return density * (math.prod(side + 2 * halo for side in sides) - math.prod(sides))


def swaps(sides: Sequence[float], halo: float) -> int:
    """Messages of an exchange, sent one after the other: 2 ceil(h / L) in each direction."""
    return sum(2 * math.ceil(halo / side) for side in sides)


def traffic(ghost_atoms: float, width: int, itemsize: int, layers: int) -> float:
    """Bytes of features in a step: g width itemsize, (layers - 1) times forward and back."""
    return ghost_atoms * width * itemsize * 2 * (layers - 1)


def recompute(sides: Sequence[float], work: Workload) -> tuple[float, float]:
    """Without an exchange: ghosts needed, and layers computed per local atom and layer.

    Layer l = 1 .. layers runs on the atoms within (layers - l) rcut; positions are needed one
    cutoff further, and the skin beyond that.
    """
    local = work.density * math.prod(sides)
    needed = ghosts(sides, work.density, work.layers * work.rcut + work.skin)
    rows = sum(local + ghosts(sides, work.density, k * work.rcut) for k in range(work.layers))
    return needed, rows / (local * work.layers)


def step(
    work: Workload, machine: Machine, sides: Sequence[float], ranks: int, crowd: float = 1.0
) -> Step:
    """The cost of a step on one of `ranks` ranks with sub-boxes of these sides (Å).

    One rank alone copies ghosts in its own memory: no messages, and no time for them here.

    Args:
        work: the network.
        machine: its times.
        sides: of the sub-box.
        ranks: how many.
        crowd: ranks that share what one has in `machine`; times of computing are as much longer.
    """
    local = work.density * math.prod(sides)
    around = ghosts(sides, work.density, work.halo)
    sent = traffic(around, work.width, work.itemsize, work.layers)
    compute = machine.floor + machine.atom * local + machine.ghost * around
    exchange = 0.0
    if ranks > 1:
        messages = work.exchanges * swaps(sides, work.halo)
        exchange = machine.latency * messages + sent / machine.link(ranks)
    return Step(local, around, sent, crowd * compute, exchange)


def limits(atoms: float, ranks: int, work: Workload, sides: Sequence[float]) -> list[str]:
    """Which whole numbers a run would overflow; empty where it would not."""
    local = atoms / ranks
    found = []
    if atoms > INT32:
        found.append("atom ids (tagint) need LAMMPS with -DLAMMPS_BIGBIG")
    if local + ghosts(sides, work.density, work.halo) > NEIGHMASK:
        found.append("local and ghost atoms of a rank")
    if local * work.neighbours > INT32:
        found.append("pairs of a rank")
    return found


@dataclass(frozen=True)
class Fit:
    """A least-squares solution: values, and their standard errors."""

    values: tuple[float, ...]
    errors: tuple[float, ...]


def least_squares(columns: Sequence[Sequence[float]], measured: Sequence[float]) -> Fit:
    """x >= 0 that minimises sum_k ((A x - y) / y)_k^2, relative deviations; its standard errors.

    A cost that would come out negative is zero, and the others are fitted again. errors^2 = diag
    (A^T A)^-1 residual / (rows - columns), of the scaled rows; infinite where there are not more
    rows than columns, and zero for costs that are zero.

    Args:
        columns: (rows, columns) A.
        measured: (rows,) y, positive.

    Raises:
        ValueError: fewer rows than columns, or columns that cannot be told apart.
    """
    y = np.asarray(measured, dtype=float)
    scaled = np.asarray(columns, dtype=float) / y[:, None]
    n_row, n_column = scaled.shape
    sizes = np.linalg.norm(scaled, axis=0)
    if n_row < n_column or (sizes == 0).any() or np.linalg.matrix_rank(scaled / sizes) < n_column:
        raise ValueError(
            f"{n_row} measured rows do not tell {n_column} parameters apart: measure more sizes"
        )
    unit, kept = scaled / sizes, np.arange(n_column)
    x = np.linalg.lstsq(unit, np.ones(n_row), rcond=None)[0]
    while (x < 0).any():
        kept = np.delete(kept, x.argmin())
        x = np.linalg.lstsq(unit[:, kept], np.ones(n_row), rcond=None)[0]
    free, part = n_row - len(kept), unit[:, kept]
    spread = float(((part @ x - 1) ** 2).sum()) / free if free else math.inf
    values, errors = np.zeros(n_column), np.zeros(n_column)
    values[kept], errors[kept] = x, np.sqrt(np.diag(np.linalg.inv(part.T @ part)) * spread)
    return Fit(tuple((values / sizes).tolist()), tuple((errors / sizes).tolist()))
