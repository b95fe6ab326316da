"""48 drawn hippynn models: imported, they give hippynn's energies, forces and stress.

Molecules, crystals, slabs and skewed cells; every network class, kind of head, activation, width.
"""

import numpy as np
import pytest
import torch
from hippynn_cases import N_DRAWS, Hippynn, draw_energy, hippynn_in_float64, needs_hippynn
from model_helpers import STRUCTURES
from physics_suite import close

from md_plugin import from_hippynn, load_model, save_model
from md_plugin.checkpoint import model_bytes

pytestmark = needs_hippynn

# Float64 through two different orders of summation, relative to the largest number of its kind.
RELATIVE = 1e-10
# float32 against float64, relative to the largest force: some hundred roundings of 6e-8; the
# worst of the draws is 1.1e-5.
SINGLE = 5e-5


@pytest.mark.parametrize("number", range(N_DRAWS))
def test_imported_is_the_same(number, tmp_path):
    with hippynn_in_float64():
        energy, options, kind = draw_energy(number)
        potential = from_hippynn(energy, dtype="float64", device="cpu", **options)
        theirs = Hippynn(energy, options.get("target"))
        expected = {name: theirs(make()) for name, make in STRUCTURES.items()}
    assert kind in potential.info["origin"]["network"].split(" + ")
    save_model(tmp_path / "model.hipnn", potential)
    again = load_model(tmp_path / "model.hipnn", dtype="float64", device="cpu")
    single = load_model(tmp_path / "model.hipnn", dtype="float32", device="cpu")
    for name, make in STRUCTURES.items():
        energy, forces, strain, atom_energy = expected[name]
        scale, structure = np.abs(forces).max(), make()
        assert scale > 1e-3, "a structure without forces tests nothing"
        found = potential.evaluate(structure)
        close(found.energy, energy, rtol=RELATIVE)
        close(found.forces, forces, atol=RELATIVE * scale)
        close(found.virial[0], -strain, atol=RELATIVE * np.abs(strain).max())
        if atom_energy is not None:
            close(found.atom_energy, atom_energy, atol=RELATIVE * np.abs(atom_energy).max())
        # The file holds all of it: not one bit differs.
        assert torch.equal(again.evaluate(structure).forces, found.forces)
        close(single.evaluate(structure).forces, forces, atol=SINGLE * scale)


def test_draws_are_many_and_different():
    """At least 40, and each option is among them."""
    with hippynn_in_float64():
        potentials = [
            from_hippynn(energy, device="cpu", **options)
            for energy, options, _ in map(draw_energy, range(N_DRAWS))
        ]
    configs = [part.config for potential in potentials for part in potential.model.parts]
    assert len({model_bytes(potential) for potential in potentials}) == N_DRAWS >= 40
    assert {c.order for c in configs} == {0, 1, 2, 3}
    assert {c.n_max for c in configs} == {0, 1, 2, 3, 4}
    assert {c.residual for c in configs} == {True, False}
    assert {c.norm_eps is None for c in configs if c.n_max} == {True, False}
    assert {c.n_interactions for c in configs} == {1, 2, 3}
    assert {c.n_atom_layers for c in configs} == {0, 1, 2}
    assert len({c.activation.split("(")[0] for c in configs}) >= 10
    for name in ("n_gaussians", "n_hidden", "pair_cutoff"):
        assert {getattr(c, name) is None for c in configs} == {True, False}, name
    assert {isinstance(c.n_feat, tuple) for c in configs} == {True, False}
    assert {len(potential.model.parts) for potential in potentials} == {1, 2}
