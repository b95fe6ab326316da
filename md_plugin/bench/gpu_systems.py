"""Networks and structures of `md-plugin bench gpu`, made on the device; neither ase nor vesin.

    A        100,000 atoms, 60 neighbours, scalar, 64 features, one layer, one species
    A2       the same, two layers
    B        50,000 atoms, 45 neighbours, vector, 128 features, two layers, four species
    C        64 molecules of 21 atoms, 20 neighbours, the network of B, as one batch
    silver   18,176, 568 and 2,272 atoms; quadrupoles, 8 features, 16 sensitivities

All of them have 20 sensitivities, silver apart, and 3 atom layers a block; weights are random.
Crystals are fcc with noise, and with vacancies where the box holds more atoms than wanted.

A floor of a step is the larger of two times, both from ceilings of the same card: matrix products
at the speed of its matrix units, and rows of features that are gathered and scattered at the speed
of rows that stay in the L2 cache. Per atom, for energies and forces, with P neighbours, C
components, n_nu sensitivities, f features,

    flop     6 P C n_nu f of each layer but the first, and what `FusedHipnn.work` counts
    bytes    3 P f times the size of a number, of each layer but the first

and a training step takes three times both. Exponentials, issue slots and launches are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.batch_neighbours import Systems
from md_plugin.bench.core import Options
from md_plugin.bench.systems import NOISE, RCUT_46, RCUT_60, SKIN, Work, network
from md_plugin.device_neighbours import search_cells
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.radial import N_COMPONENTS
from md_plugin.neighbours import complete_cell
from md_plugin.pairs import Geometry, Pairs

ALUMINIUM, SILVER = 4.05, 4.09  # Å, cubic cells
MOLECULE, BOND = 21, 2.25  # atoms; Å, side of the cubic cell of which molecules are cut out
STIR = 0.02  # Å, of atoms of molecules; hippynn warns, at a cost, of pairs below 1.43 Å
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
VECTOR: dict[str, Any] = {"species": (1, 6, 7, 8), "order": 1, "n_feat": 128, "rcut": RCUT_46}
QUADRUPOLE: dict[str, Any] = {"species": (47,), "order": 2, "n_feat": 8, "n_nu": 16, "rcut": 4.0}


@dataclass(frozen=True)
class Workload:
    """A network and the size of what it computes.

    Attributes:
        what: in tables.
        atoms: of the crystal; of all molecules where there are some.
        layers: interaction layers.
        shape: changes of `systems.network`.
        side: of the cubic cell of the crystal, Å.
        molecules: whether it is a batch of them.
    """

    what: str
    atoms: int
    layers: int = 1
    shape: dict[str, Any] = field(default_factory=dict)
    side: float = ALUMINIUM
    molecules: bool = False

    def network(self) -> Hipnn:
        """With random weights, on the CPU."""
        return network(self.layers, **self.shape)

    def problem(self, options: Options, atoms: int = 0, seed: int = 0) -> DeviceProblem:
        """Atoms on the device of options: as many as said, or all of them."""
        rng = np.random.default_rng([options.seed, seed])
        n, species = atoms or self.atoms, self.shape.get("species", (13,))
        build = molecules if self.molecules else crystal
        systems = build(n, self.side, species, rng)
        rcut = self.shape.get("rcut", RCUT_60)
        return DeviceProblem(on_device(systems, torch.device(options.device)), rcut)


_B = {**VECTOR, "r_max": 5.2}
WORKLOADS = {
    "A": Workload("A: 1 layer, 64 features", 100_000),
    "A2": Workload("A2: 2 layers, 64 features", 100_000, 2),
    "B": Workload("B: 2 vector layers, 128 features", 50_000, 2, _B),
    "C": Workload("C: molecules, network of B", 64 * MOLECULE, 2, _B, BOND, molecules=True),
}
LOOP_SIZES = (18_176, 568, 2_272)
LOOP = Workload("silver", LOOP_SIZES[0], 1, {**QUADRUPOLE, "r_min": 1.5, "r_max": 3.8}, SILVER)
TINY = {"n_feat": 4, "n_nu": 4}  # of networks on a CPU


def sized(workload: Workload, options: Options) -> Workload:
    """As asked for: tiny on a CPU, whose Triton is interpreted; a twentieth with --quick."""
    if not options.device.startswith("cuda"):
        n = 2 * MOLECULE if workload.molecules else 32
        return replace(workload, atoms=n, shape={**workload.shape, **TINY})
    if not options.quick:
        return workload
    unit = MOLECULE if workload.molecules else 1
    return replace(workload, atoms=max(1, workload.atoms // (20 * unit)) * unit)


@dataclass(frozen=True, eq=False)
class DeviceProblem(Work):
    """Systems on a device, and their pairs for one cutoff, found there by cells.

    Attributes:
        systems: one, or many without periodic directions.
        rcut: cutoff, Å.
    """

    systems: Systems
    rcut: float

    @cached_property
    def geometry(self) -> Geometry:
        """Positions and a list with skin."""
        s = self.systems
        pbc = np.array(s.pbc)
        cells = np.stack([complete_cell(h, pbc) for h in s.cell.cpu().numpy()])
        found = search_cells(s.positions, cells, pbc, self.rcut + SKIN, system=s.system)
        if not any(s.pbc):
            return Geometry(s.positions, found.pairs)
        h = s.cell[0]
        x = s.positions + found.wraps @ h
        return Geometry(x, found.pairs, found.image.short(), found.images @ h)

    @cached_property
    def species(self) -> Tensor:
        """(n,) atomic numbers."""
        return self.systems.species

    @property
    def n_structures(self) -> int:  # type: ignore[override]
        """How many systems there are."""
        return self.systems.n_systems

    @property
    def structure(self) -> Tensor | None:  # type: ignore[override]
        """(n,) which system each atom belongs to; None for one."""
        return self.systems.system if self.n_structures > 1 else None


def crystal(n: int, side: float, species: tuple[int, ...], rng: np.random.Generator) -> Systems:
    """Fcc of exactly n atoms, displaced by `NOISE`, of random species; on the CPU."""
    repeat = [2, 2, 2]
    while 4 * np.prod(repeat) < n:
        repeat[int(np.argmin(repeat))] += 1
    cells = np.indices(repeat).reshape(3, -1).T
    x = (cells[:, None] + FCC).reshape(-1, 3) * side
    x = x[np.sort(rng.permutation(len(x))[:n])]
    x = x + rng.normal(scale=NOISE, size=x.shape)
    cell = np.diag(side * np.array(repeat, float))[None]
    return _systems(x, cell, np.zeros(n, int), rng.choice(species, n), True)


def molecules(n: int, side: float, species: tuple[int, ...], rng: np.random.Generator) -> Systems:
    """n / 21 clusters of 21 atoms, the sites of fcc next to one of them; on the CPU."""
    sites = ((np.indices((5, 5, 5)).reshape(3, -1).T - 2)[:, None] + FCC).reshape(-1, 3) * side
    near = sites[np.argsort(np.linalg.norm(sites, axis=1), kind="stable")[:MOLECULE]]
    count = n // MOLECULE
    n = count * MOLECULE
    x = np.tile(near, (count, 1)) + rng.normal(scale=STIR, size=(n, 3))
    system = np.repeat(np.arange(count), MOLECULE)
    return _systems(x, np.zeros((count, 3, 3)), system, rng.choice(species, n), False)


def _systems(x: Any, cell: Any, system: Any, species: Any, periodic: bool) -> Systems:
    species, x, cell, system = (torch.from_numpy(a) for a in (species, x, cell, system))
    return Systems(species, x, cell, system, (periodic,) * 3)


def on_device(systems: Systems, device: torch.device) -> Systems:
    """The same systems there."""
    s = systems
    species, x, cell, system = (t.to(device) for t in (s.species, s.positions, s.cell, s.system))
    return Systems(species, x, cell, system, s.pbc)


def counts(net: Hipnn, pairs: Pairs) -> dict[str, float]:
    """Flop, and numbers of gathered rows, per atom of an evaluation; see the module."""
    from md_plugin.model.fusion import FusedHipnn

    c, neighbours = net.config, pairs.n_pair / max(pairs.n_recv, 1)
    rows = neighbours * net.n_feat * (c.n_interactions - 1)
    # The work of matrices is the same for any backend; numba counts it without a GPU.
    work = FusedHipnn(net.float().cpu(), "numba").work
    flop = 6 * rows * N_COMPONENTS[c.order] * c.n_nu + work
    return {"flop": flop, "numbers": 3 * rows, "features": net.n_feat}


def floor(
    counted: dict[str, float], ceilings: dict[str, float], *, half: bool, passes: int
) -> float:
    """Seconds per atom that the card takes at least.

    Args:
        counted: of `counts`.
        ceilings: of `gpu_ceilings`.
        half: whether sums are in float16; else float32 as three products of tf32.
        passes: evaluations that the work amounts to: 1, or 3 in training.
    """
    speed = ceilings["gemm_fp16_tflops"] if half else ceilings["gemm_tf32_tflops"] / 3
    size = 2 if half else 4
    row = 512 if size * counted["features"] > 256 else 256
    rows, gathered = ceilings[f"gather_{row}_gb_per_s"], size * counted["numbers"]
    return passes * max(counted["flop"] * 1e-12 / speed, gathered * 1e-9 / rows)
