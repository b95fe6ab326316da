"""Molecular dynamics on the device: constant energy, velocity Verlet, as a case of the GPU bench.

    v += dt F / 2m        x += dt v        F = F(x)        v += dt F / 2m

The list is a `BatchList` with a skin of 1 Å: each step asks the device whether it still holds, and
it is searched anew there where it does not. No position leaves the device. The time of a step is
the mean over many, with the searches that fall among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from md_plugin.batch_neighbours import BatchList, Systems, search_on_device
from md_plugin.bench.contest import AGAIN, run
from md_plugin.bench.core import OURS, Contest, Options, Provider, Row, poison, relative
from md_plugin.bench.gpu_contest import potential
from md_plugin.bench.gpu_systems import LOOP, LOOP_SIZES, DeviceProblem, Workload, sized
from md_plugin.bench.systems import CHECKED_ATOMS, exact
from md_plugin.potential import Potential

MASS = 107.8682  # u, silver
KELVIN = 8.617333262e-5  # eV
ACCELERATION = 9.648533212e-3  # Å/fs² of 1 eV/Å on 1 u: CODATA 2018, e / (u 1e10)
TEMPERATURE, DT, SKIN = 300.0, 1.0, 1.0  # K, fs, Å
STEPS, FEW_STEPS = 200, 3  # in a turn: on a GPU, on a CPU


class Dynamics:
    """Atoms of one mass that move.

    Args:
        potential: on the device of the systems.
        systems: where the atoms start; they are copied.
        seed: of the velocities.

    Attributes:
        steps, builds: steps, and searches of the list, so far.
        forces: (n, 3) eV/Å, at the positions of `systems`.
        energy: potential energy, eV, likewise.
    """

    def __init__(self, potential: Potential, systems: Systems, seed: int):
        self.potential, self.steps, self.builds = potential, 0, 0
        self.systems = replace(systems, positions=systems.positions.clone())
        self.neighbours = BatchList(potential.rcut, SKIN, search_on_device)
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(systems.positions.shape, generator=generator, dtype=torch.float64)
        v *= (KELVIN * TEMPERATURE / MASS * ACCELERATION) ** 0.5
        self.v = (v - v.mean(dim=0)).to(systems.positions.device)
        self._evaluate()

    def step(self) -> None:
        """Go on by `DT`."""
        self.steps += 1
        half = 0.5 * DT * ACCELERATION / MASS
        self.v.add_(self.forces, alpha=half)
        self.systems.positions.add_(self.v, alpha=DT)
        self._evaluate()
        self.v.add_(self.forces, alpha=half)

    def total_energy(self) -> float:
        """Potential and kinetic, eV."""
        return float(self.energy + 0.5 * MASS / ACCELERATION * self.v.square().sum())

    def _evaluate(self) -> None:
        if not self.neighbours.fits(self.systems):
            self.neighbours.build(self.systems)
            self.builds += 1
        geometry = self.neighbours.geometry(self.systems)
        found = self.potential.evaluate_geometry(self.systems.species, geometry)
        assert found.forces is not None
        self.forces, self.energy = found.forces.double(), found.energy.sum()


def loop(options: Options, absent: str = "") -> Iterator[Row]:
    """A step in the shape of LANL's "MLMD" benchmark, by ours with graphs and without."""
    load = sized(LOOP, options)
    sizes = LOOP_SIZES if options.device.startswith("cuda") else (load.atoms,)
    for n in sizes[1:2] if options.quick and len(sizes) > 1 else sizes:
        yield from steps(replace(load, atoms=n), options)


def steps(load: Workload, options: Options) -> Iterator[Row]:
    """Rows of one number of atoms."""
    net, n = load.network(), load.atoms
    start = load.problem(options).systems
    small = load.problem(options, min(CHECKED_ATOMS, n), seed=1).systems
    moving: dict[str, Dynamics] = {}
    turn = STEPS if options.device.startswith("cuda") else FEW_STEPS

    def provider(name: str, graphs: str) -> Provider:
        made = potential(net, options, graphs=graphs)

        def call() -> float:
            if name not in moving:
                moving[name] = Dynamics(made, start, options.seed)
            clock = options.clock
            begin = clock()
            for _ in range(turn):
                moving[name].step()
            return (clock() - begin) / turn

        def error() -> float:
            poison(device=options.device)
            checked = Dynamics(made, small, options.seed)
            for _ in range(FEW_STEPS):
                checked.step()
            want = exact(net, DeviceProblem(checked.systems, net.rcut)).forces
            assert want is not None
            return relative(checked.forces, want)

        return Provider(name, OURS, call, error, own_clock=True)

    providers = provider("ours", "auto"), provider("ours, no graphs", "never")
    contest = Contest(f"{load.what}, {n} atoms: MD step", providers, atoms=n, notes={"atoms": n})
    for row in run("", contest, options):
        dynamics = moving.get(row.provider.removesuffix(AGAIN))
        if dynamics is not None:
            made = {"steps": dynamics.steps, "searches of the list": dynamics.builds}
            row = replace(row, notes={**row.notes, **made})
        yield row
