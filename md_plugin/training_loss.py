"""The training loss, and the errors that are reported.

    w_i   = 1 / (1 + |F_i| / F0)^2                     label forces; 1 where F0 is None
    w_s   = mean of w_i over the atoms of structure s
    loss  =   a_E mean_s   w_s h_E(dE_s / n_s)         energy per atom
            + a_F mean_i,c w_i h_F(dF_ic)              force components
            + a_S mean_s,c w_s h_S(dW_s,c / n_s)       virial per atom, structures with stress only

d is predicted minus label, h_delta the Huber function: x^2/2 up to delta, then linear. The weight
w_i keeps atoms that nearly touch (hundreds of eV/Å) from outvoting the rest: far above F0 an error
counts relative to the force itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import huber_loss

from md_plugin.data import LabelledBatch
from md_plugin.evaluation import Evaluation, segment_sum
from md_plugin.potential import Potential
from md_plugin.training_config import TrainingConfig

FloatArray = NDArray[np.float64]


def force_weights(forces: Tensor, scale: float | None) -> Tensor:
    """Weights (n_atom,) in (0, 1] from label forces (n_atom, 3), eV/Å."""
    if scale is None:
        return torch.ones_like(forces[:, 0])
    size: Tensor = torch.linalg.vector_norm(forces, dim=1)
    return (1.0 + size / scale).pow(-2)


def loss_of(result: Evaluation, labels: LabelledBatch, config: TrainingConfig) -> Tensor:
    """The loss of one batch, a float64 scalar; see the module's equations."""
    assert result.forces is not None and result.virial is not None
    batch, weights, huber = labels.batch, config.weights, config.huber
    n_atoms = batch.n_atoms.double()
    w_atom = force_weights(labels.forces, config.force_scale)
    w_structure = segment_sum(w_atom, batch.structure, batch.n_structures) / n_atoms

    def term(predicted: Tensor, label: Tensor, weight: Tensor, delta: float) -> Tensor:
        return (weight * huber_loss(predicted, label, reduction="none", delta=delta)).mean()

    energy = term(result.energy / n_atoms, labels.energy / n_atoms, w_structure, huber.energy)
    forces = term(result.forces.double(), labels.forces, w_atom[:, None], huber.forces)
    loss = weights.energy * energy + weights.forces * forces
    known = torch.isfinite(labels.virial[:, 0, 0])
    if weights.stress > 0 and bool(known.any()):
        per_atom = (1.0 / n_atoms[known])[:, None, None]
        virial = result.virial[known].double() * per_atom
        label = labels.virial[known] * per_atom
        loss = loss + weights.stress * term(
            virial, label, w_structure[known, None, None], huber.stress
        )
    return loss


def evaluate_labelled(
    potential: Potential, labels: LabelledBatch, create_graph: bool = False
) -> Evaluation:
    """Energies, forces and virials of a labelled batch; create_graph keeps them differentiable."""
    batch = labels.batch
    return potential.evaluate_pairs(
        batch.species,
        batch.pairs,
        batch.r_ij,
        structure=batch.structure,
        n_structures=batch.n_structures,
        create_graph=create_graph,
    )


@dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and predictions of a set, structure by structure.

    Attributes:
        loss: mean of the batches' losses, weighted by their structures.
        n_atoms: (n_structures,).
        energy: (2, n_structures) eV/atom; row 0 label, row 1 predicted.
        forces: (2, n_atom, 3) eV/Å.
        stress: (2, n_structures, 3, 3) eV/Å^3, NaN where there is no label.
    """

    loss: float
    n_atoms: NDArray[np.int64]
    energy: FloatArray
    forces: FloatArray
    stress: FloatArray

    def select(self, structures: NDArray[np.bool_]) -> Predictions:
        """Those of some structures, mask (n_structures,)."""
        atoms = np.repeat(structures, self.n_atoms)
        kept = (self.energy[:, structures], self.forces[:, atoms], self.stress[:, structures])
        return Predictions(self.loss, self.n_atoms[structures], *kept)


def predict(
    potential: Potential, batches: Iterable[LabelledBatch], config: TrainingConfig
) -> Predictions:
    """Evaluate batches one after the other."""
    losses, sizes, atoms, energy, forces, stress = [], [], [], [], [], []
    for labels in batches:
        result = evaluate_labelled(potential, labels)
        assert result.forces is not None and result.virial is not None
        batch = labels.batch
        losses.append(float(loss_of(result, labels, config)))
        sizes.append(batch.n_structures)
        atoms.append(batch.n_atoms)
        energy.append(torch.stack([labels.energy, result.energy.double()]) / batch.n_atoms)
        forces.append(torch.stack([labels.forces, result.forces.double()]))
        virial = torch.stack([labels.virial, result.virial.double()])
        stress.append(-virial / batch.volume[:, None, None])
    return Predictions(
        float(np.average(losses, weights=sizes)),
        torch.cat(atoms).numpy(),
        torch.cat(energy, dim=1).numpy(),
        torch.cat(forces, dim=1).numpy(),
        torch.cat(stress, dim=1).numpy(),
    )


def errors_of(p: Predictions) -> dict[str, float | int | None]:
    """MAE and RMSE: meV/atom, meV/Å (components), GPa; None where a label does not exist."""
    out: dict[str, float | int | None] = {
        "n_structures": len(p.n_atoms),
        "n_atoms": int(p.n_atoms.sum()),
    }
    gpa = 160.21766208
    known = np.isfinite(p.stress).all(axis=(0, 2, 3)) if len(p.n_atoms) else np.zeros(0, bool)
    for name, unit, pair in (
        ("energy", 1e3, p.energy),
        ("forces", 1e3, p.forces),
        ("stress", gpa, p.stress[:, known]),
    ):
        d = (pair[1] - pair[0]) * unit
        out[f"{name}_mae"] = float(np.abs(d).mean()) if d.size else None
        out[f"{name}_rmse"] = float(np.sqrt(np.square(d).mean())) if d.size else None
    return out
