"""What is done in the cases that compute a whole network, by ours and by hippynn, on any device.

    Results     energy, and forces (n, 3) on atoms or dE/dr_ij (n_pair, 3) on pairs inside
    gradients   of L = (E / n)^2 + mean F^2 in the weights of interactions, layer by layer

Errors are relative to the same weights in float64, by torch's plain operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from md_plugin.bench.core import relative, worst
from md_plugin.bench.systems import Work, exact
from md_plugin.evaluation import pair_forces_to_atoms
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

TRAINED = 2e-4  # gradients of a loss that is quadratic in forces: errors of float32 add up
Results = tuple[Tensor, Tensor]


def fused(potential: Potential, problem: Work) -> Results:
    """Energy and forces from positions and the skin list."""
    found = potential.evaluate_geometry(
        problem.species,
        problem.geometry,
        structure=problem.structure,
        n_structures=problem.n_structures,
    )
    assert found.forces is not None
    return found.energy, found.forces


def closed(potential: Potential, problem: Work) -> Results:
    """Energy and forces from vectors of pairs within the cutoff, by autograd."""
    pairs, r = problem.inside
    found = potential.evaluate_pairs(problem.species, pairs, r)
    assert found.forces is not None
    return found.energy, found.forces


def peer(twin: Any, problem: Work) -> Results:
    """The same by hippynn's graph; it leaves forces on pairs, whose sum is not its cost."""
    energy, gradient = twin.evaluate(problem, problem.inside[1].float())
    return energy.detach().reshape(1), gradient


def energy_error(net: Hipnn, problem: Work, found: Results) -> float:
    """Of energy and forces; forces on pairs are summed first."""
    energy, forces = found
    if len(forces) != len(problem.species):
        forces = problem.sum_forces(forces)
    want = exact(net, problem)
    assert want.forces is not None
    # Energies of atoms may cancel, with random weights: their sizes are the scale.
    off = float((energy.double().sum() - want.energy).abs()) / float(want.atom_energy.abs().sum())
    return worst(off, relative(forces, want.forces))


def training_step(potential: Potential, problem: Work) -> list[Tensor]:
    """Gradients of the loss in the interaction weights, layer by layer (nu, in, out)."""
    net: Any = potential.model
    net.zero_grad()
    pairs, r = problem.inside
    found = potential.evaluate_pairs(problem.species, pairs, r, create_graph=True)
    assert found.forces is not None
    torch.autograd.backward(_loss(found.energy, found.forces))
    return [block[0].layer.weight.grad for block in net.blocks]


def peer_step(twin: Any, problem: Work) -> list[Tensor]:
    """The same by hippynn, in our order of axes."""
    pairs = problem.inside[0]
    twin.graph.zero_grad()
    energy, g = twin.evaluate(problem, problem.inside[1].float())
    forces = pair_forces_to_atoms(g, pairs)
    torch.autograd.backward(_loss(energy, forces))
    return [p.grad.permute(0, 2, 1) for p in twin.parameter("int_weights")]


def gradient_error(net: Hipnn, problem: Work, found: list[Tensor]) -> float:
    """Of the gradients of a training step."""
    double = Hipnn(net.config, backend="torch")
    double.load_state_dict(net.state_dict())
    exactly = Potential(double, device=problem.species.device, dtype="float64")
    return worst(*map(relative, found, training_step(exactly, problem)))


def _loss(energy: Tensor, forces: Tensor) -> Tensor:
    return (energy / len(forces)).square().sum() + forces.square().mean()
