"""Steps on 8, 64 and 1,024 GPUs, predicted by `md_plugin.scaling` from assumptions.

Nothing here was measured. Times of an atom are targets for H200, from counts of operations and
bytes and from the ceilings of that GPU; bandwidths are those that vendors publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from md_plugin import scaling
from md_plugin.scaling import Machine, Workload

GPUS = (8, 64, 1024)
WEAK, STRONG = 100_000, (10**6, 10**8, 10**9)  # atoms per GPU; atoms
CAPACITY = 139 * 2**30  # bytes of an H200
ENGINE_ATOM = 300.0  # bytes of an atom in LAMMPS
ENGINE = 200e-6  # s of a step: LAMMPS's own kernels and its exchange of positions
LAUNCH = 2.5e-6  # s of a kernel in a CUDA graph
COLUMNS = (
    *("network", "scaling", "GPUs", "atoms", "a GPU", "ghosts a GPU", "step, ms"),
    *("in exchange", "at the floor, ms", "atom-steps/s", "efficiency", "GB a GPU", "fits"),
)
ASSUMED = """\
Nothing in this table was measured. Assumed, for H200: an atom takes 6, 30 and 120 ns (targets; the
floors of float32 in three products of tf32 are 0.94, 9.1 and 70 ns, by counts of operations);
2.5 µs a kernel in a CUDA graph; 200 µs for LAMMPS itself; 10 µs a message; 450 GB/s to GPUs of the
node (NVLink, 8 GPUs), 50 GB/s to other nodes (400 Gb/s InfiniBand for each GPU), arrays exchanged
from GPU memory; 0.3 kB an atom in LAMMPS; 139 GiB. Counted (docs/gpu.md): 12, 23 and 23 kernels;
0.12, 1.5 and 4.2 kB an atom beside its list.
"efficiency": the time of a GPU's own atoms over that of the step. Fluctuations of load are not in
the model."""


@dataclass(frozen=True)
class Assumed:
    """A network on a GPU: seconds of an atom, aimed at and at least; launches; bytes of an atom."""

    work: Workload
    atom: float
    least: float
    launches: int
    bytes: float

    @property
    def machine(self) -> Machine:
        """A GPU among others."""
        floor = ENGINE + LAUNCH * self.launches
        return Machine(floor, self.atom, 10e-6, 450e9, network=50e9)


NETWORKS = (
    Assumed(Workload("1 layer, 64 features", 1, 64, 6.27, 1.0, 0.0602), 6e-9, 0.94e-9, 12, 120.0),
    Assumed(Workload("2 layers, 64 features", 2, 64, 6.27, 1.0, 0.0602), 30e-9, 9.1e-9, 23, 1500.0),
    Assumed(
        Workload("2 vector layers, 128 features", 2, 128, 5.7, 1.0, 0.0602),
        *(120e-9, 70e-9, 23, 4200.0),
    ),
)


@dataclass(frozen=True)
class Prediction:
    """A row: s, bytes; `problems` names what does not fit."""

    network: str
    kind: str
    gpus: int
    atoms: float
    ghosts: float
    seconds: float
    exchange: float
    least: float
    efficiency: float
    memory: float
    problems: list[str]

    def cells(self) -> list[str]:
        """As in COLUMNS."""
        return [
            self.network,
            self.kind,
            f"{self.gpus:,}",
            f"{self.atoms:.3g}",
            f"{self.atoms / self.gpus:.3g}",
            f"{self.ghosts:.3g}",
            f"{1e3 * self.seconds:.3g}",
            f"{100 * self.exchange / self.seconds:.0f} %",
            f"{1e3 * self.least:.3g}",
            f"{self.atoms / self.seconds:.2g}",
            f"{100 * self.efficiency:.0f} %",
            f"{1e-9 * self.memory:.3g}",
            "; ".join(self.problems) or "yes",
        ]


def predictions() -> list[Prediction]:
    """All rows: weak scaling, then strong scaling, of each network."""
    return [
        predict(network, kind, gpus, atoms)
        for network in NETWORKS
        for kind, gpus, atoms in _sizes()
    ]


def _sizes() -> Iterator[tuple[str, int, float]]:
    for gpus in GPUS:
        yield "weak", gpus, WEAK * gpus
    for atoms in STRONG:
        for gpus in GPUS:
            yield "strong", gpus, atoms


def predict(network: Assumed, kind: str, gpus: int, atoms: float) -> Prediction:
    """A step of so many atoms on so many GPUs, with cubic sub-boxes."""
    work, machine = network.work, network.machine
    sides = scaling.cube(atoms / gpus, work.density)
    step = scaling.step(work, machine, sides, gpus)
    least = scaling.step(work, replace(machine, atom=network.least), sides, gpus)
    memory = memory_of(network, step)
    problems = scaling.limits(atoms, gpus, work, sides)
    if memory > CAPACITY:
        problems.append("memory")
    return Prediction(
        work.name,
        kind,
        gpus,
        atoms,
        step.ghosts,
        step.seconds,
        step.exchange,
        least.seconds,
        machine.atom * step.local / step.seconds,
        memory,
        problems,
    )


def memory_of(network: Assumed, step: scaling.Step) -> float:
    """Bytes of a GPU: n (network + list + LAMMPS) + g (z and dE/dz of each layer + LAMMPS)."""
    work = network.work
    atom = network.bytes + 4 * work.neighbours + ENGINE_ATOM
    ghost = 2 * (work.layers - 1) * work.width * work.itemsize + ENGINE_ATOM
    return step.local * atom + step.ghosts * ghost


def plot(axes: Any) -> None:
    """Strong scaling of the network of two layers, 10^6 to 10^9 atoms, where it fits."""
    network = NETWORKS[1]
    gpus = [2**k for k in range(11)]
    for k, atoms in enumerate(STRONG):
        found = [predict(network, "strong", count, atoms) for count in gpus]
        fit = [row for row in found if not row.problems]
        times = [1e3 * row.seconds for row in fit]
        axes.plot([row.gpus for row in fit], times, f"C{k}-", label=f"{atoms:,} atoms")
        ideal = 1e3 * network.atom * atoms / np.array(gpus)
        axes.plot(gpus, ideal, f"C{k}:", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="a step predicted, ms")
    axes.set_title("2 layers, 64 features; assumed costs (dotted: ideal)", fontsize=8)
    axes.legend(fontsize=7)
