"""Cases of the bench that compute a whole network: energy and forces, training, ASE, silver.

    model     energy and forces from positions (fused) or pair vectors (closed, hippynn)
    train     L = (E / n)^2 + mean F^2, its gradient in all weights
    ase       atoms move by 1e-3 Å, energy and forces from both ASE calculators; lists are reused
    silver    the shape of the LAMMPS benchmark "MLMD" of LANL's ATS-5 suite: fcc silver, 568 to
              18,176 atoms, quadrupoles, 8 features, 16 sensitivities, one interaction layer with 3
              atom layers, cutoff 4 Å; the network's weights are random

Errors are those of energy and forces (train: of the gradient in the interaction weights) on another
structure, against the same weights in float64 by torch's plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from md_plugin.bench.core import (
    FLOAT32,
    HIPPYNN,
    OURS,
    Contest,
    Options,
    Provider,
    peer_absence,
    present,
)
from md_plugin.bench.systems import (
    CHECKED_ATOMS,
    Problem,
    Twin,
    aluminium,
    network,
    silver,
)
from md_plugin.bench.work import (
    TRAINED,
    Results,
    closed,
    energy_error,
    fused,
    gradient_error,
    peer,
    peer_step,
    training_step,
)
from md_plugin.calculator import HipnnCalculator
from md_plugin.hippynn_io import to_hippynn
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

PEER = "hippynn, numba"
SILVER_SIZES = (568, 2272, 18176)
Builder = Callable[[int, int], Atoms]


def model(options: Options) -> Iterator[Contest]:
    """Energy and forces: one and two scalar layers, two vector layers (a quarter of the atoms)."""
    n = options.atoms
    yield model_contest("A: 1 layer, 64 features", network(1), options, n)
    yield model_contest("A2: 2 layers, 64 features", network(2), options, n)
    yield model_contest(
        "TS: 2 vector layers, 64 features",
        network(2, order=1),
        options,
        max(1, n // 4),
    )


def model_contest(
    what: str, net: Hipnn, options: Options, n_atoms: int, build: Builder = aluminium
) -> Contest:
    """Energy and forces of one network by all providers.

    Args:
        what: name in the tables.
        net: the network, float32.
        options: of the run.
        n_atoms: wanted atoms.
        build: makes a structure from n_atoms and a seed.
    """
    rcut = net.rcut
    timed = Problem(build(n_atoms, options.seed), rcut)
    small = Problem(build(min(CHECKED_ATOMS, n_atoms), options.seed + 1), rcut)
    potential = Potential(net, dtype="float32")
    reason = potential.why_not_fused()
    twin = None if peer_absence() else Twin(net)
    kinds: list[tuple[str, str, Callable[[Problem], Results]]] = [
        ("ours, fused", OURS, lambda problem: fused(potential, problem)),
        ("ours, closed", OURS, lambda problem: closed(potential, problem)),
        (PEER, HIPPYNN, lambda problem: peer(twin, problem)),
    ]
    providers = [
        Provider(
            name,
            side,
            call=lambda function=function: function(timed),  # type: ignore[misc]
            error=lambda function=function: energy_error(net, small, function(small)),  # type: ignore[misc]
            absent=f"not yet: {reason}" if name == "ours, fused" and reason else "",
        )
        for name, side, function in kinds
    ]
    c = net.config
    notes = timed.notes() | {"config": {k: v for k, v in vars(c).items() if k != "species"}}
    n = len(timed.atoms)
    return Contest(what, present(providers), PEER, n, notes=notes, counted=True)


def train(options: Options) -> Iterator[Contest]:
    """One training step: loss of energy and forces, its gradient in all weights."""
    for layers in (1, 2):
        net = network(layers)
        timed = Problem(aluminium(max(1, options.atoms // 4), options.seed), net.rcut)
        small = Problem(aluminium(64, options.seed + 1), net.rcut)
        potential = Potential(net, dtype="float32")
        twin = None if peer_absence() else Twin(net)

        def ours(problem: Problem, potential: Potential = potential) -> list[Tensor]:
            return training_step(potential, problem)

        def theirs(problem: Problem, twin: Any = twin) -> list[Tensor]:
            return peer_step(twin, problem)

        providers = [
            Provider(
                name,
                side,
                call=lambda step=step, timed=timed: step(timed),  # type: ignore[misc]
                error=lambda step=step, net=net, p=small: gradient_error(net, p, step(p)),  # type: ignore[misc]
                tolerance=TRAINED,
            )
            for name, side, step in (("ours, closed", OURS, ours), (PEER, HIPPYNN, theirs))
        ]
        what = f"training step, {layers} layer{'s' * (layers > 1)}"
        n = len(timed.atoms)
        yield Contest(what, present(providers), PEER, n, notes=timed.notes())


def ase(options: Options) -> Iterator[Contest]:
    """One MD step in ASE, one and two layers."""
    for layers in (1, 2):
        net = network(layers)
        small = Problem(aluminium(min(CHECKED_ATOMS, options.atoms), options.seed + 1), net.rcut)
        atoms = aluminium(options.atoms, options.seed)

        def provider(name: str, side: str, make: Any, net: Any, p: Any, atoms: Any) -> Provider:
            system = atoms.copy()
            if side == OURS or not peer_absence():
                system.calc = make(net)
            rng = np.random.default_rng(options.seed)

            def step() -> None:
                system.positions += rng.normal(scale=1e-3, size=system.positions.shape)
                system.get_forces()
                system.get_potential_energy()

            def error() -> float:
                checked = p.atoms.copy()
                checked.calc = make(net)
                forces = torch.from_numpy(checked.get_forces())
                energy = torch.tensor([checked.get_potential_energy()])
                return energy_error(net, p, (energy, forces))

            # hippynn rounds positions, not their differences, to float32
            return Provider(
                name, side, step, error, tolerance=FLOAT32 * (5 if side == HIPPYNN else 1)
            )

        providers = [
            provider("ours", OURS, our_calculator, net, small, atoms),
            provider(PEER, HIPPYNN, peer_calculator, net, small, atoms),
        ]
        what = f"ASE step, {layers} layer{'s' * (layers > 1)}"
        n = len(atoms)
        yield Contest(what, present(providers), PEER, n, notes={"atoms": n, "skin": 1.0})


def our_calculator(net: Hipnn) -> Any:
    """The ASE calculator of this project."""
    return HipnnCalculator(Potential(net, dtype="float32"), skin=1.0)


def peer_calculator(net: Hipnn) -> Any:
    """hippynn's ASE calculator of the same weights."""
    from ase import units
    from hippynn.interfaces.ase_interface import HippynnCalculator

    calculator = HippynnCalculator(to_hippynn(net), en_unit=units.eV, skin=1.0)
    calculator.to(torch.float32)
    return calculator


def silver_case(options: Options) -> Iterator[Contest]:
    """The shape of LANL's ATS-5 "MLMD": silver, 568 to 18,176 atoms; LAMMPS at 568."""
    from md_plugin.bench.lammps import lammps_contest

    net = silver_network()
    for n in SILVER_SIZES[:1] if options.quick else SILVER_SIZES:
        yield model_contest(f"silver, {n} atoms", net, options, n, silver)
    yield lammps_contest("silver, LAMMPS step", net, silver(SILVER_SIZES[0]), options)


def silver_network() -> Hipnn:
    """Of the shape of LANL's benchmark; weights are random."""
    return network(
        *(1,),
        species=(47,),
        order=2,
        n_feat=8,
        n_nu=16,
        rcut=4.0,
        r_min=1.5,
        r_max=3.8,
    )
