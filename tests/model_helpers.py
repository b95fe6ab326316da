"""Small models with random weights, small structures, and checks that several tests share."""

import numpy as np
import torch

from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import Structure
from md_plugin.potential import Potential

SPECIES = (1, 6, 8)
REFERENCE = (-13.6, -1030.123456789, -2040.987654321)


def make_model(seed=0, backend=None, **changes):
    """A float64 network, strong enough for forces of some eV/Å; `seed` says which.

    Its weights are not numbers that float32 can hold.
    """
    config = {"species": SPECIES, "n_feat": 5, "n_nu": 6, "n_interactions": 2, "n_atom_layers": 1}
    config |= {"rcut": 3.0, "r_min": 0.8, "r_max": 2.6, "reference_energies": REFERENCE} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Hipnn(HipnnConfig(**config), backend=backend).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                strength = 3.0 if "layer.weight" in name or "readouts" in name else 1.0
                parameter.mul_(strength + 1e-9 * torch.rand_like(parameter))
        return model


def make_potential(dtype="float64", info=None, **changes):
    """A potential on the CPU; see `make_model` for the changes."""
    return Potential(make_model(**changes), device="cpu", dtype=dtype, info=info)


def perturbed(fractional, cell, seed, size=0.03):
    """Positions off any symmetric place."""
    rng = np.random.default_rng(seed)
    x = np.asarray(fractional, float) @ cell
    return x + rng.uniform(-size, size, x.shape)


def molecule():
    """Ethanol-like heap of 6 atoms without a cell."""
    x = np.array([[0, 0, 0], [1.4, 0, 0], [2.0, 1.3, 0], [-0.5, 0.9, 0.3], [-0.4, -0.6, 0.8]])
    x = np.vstack([x, [[1.7, -0.7, -0.7]]])
    return Structure(np.array([6, 6, 8, 1, 1, 1]), x)


def crystal():
    """Rock-salt-like cube of 4 atoms, smaller than twice the cutoff: atoms see their images."""
    cell = 3.4 * np.eye(3)
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(np.array([6, 8, 6, 1]), perturbed(sites, cell, 1, 0.1), cell, np.ones(3, bool))


def slab():
    """Five atoms, periodic in two directions."""
    cell = np.array([[3.2, 0.0, 0.0], [0.8, 3.3, 0.0], [0.0, 0.0, 12.0]])
    sites = [[0, 0, 0.4], [0.5, 0.5, 0.42], [0, 0.4, 0.53], [0.5, 0.05, 0.55], [0.2, 0.2, 0.65]]
    pbc = np.array([True, True, False])
    return Structure(np.array([6, 8, 6, 6, 1]), perturbed(sites, cell, 2, 0.1), cell, pbc)


def triclinic():
    """Three atoms in a skewed cell that is smaller than the cutoff."""
    cell = np.array([[2.6, 0.0, 0.0], [1.5, 2.5, 0.0], [-0.9, 1.1, 2.4]])
    sites = [[0, 0, 0], [0.45, 0.5, 0.4], [0.1, 0.6, 0.7]]
    return Structure(np.array([8, 6, 1]), perturbed(sites, cell, 3, 0.1), cell, np.ones(3, bool))


STRUCTURES = {"molecule": molecule, "crystal": crystal, "slab": slab, "triclinic": triclinic}


def to_atoms(structure):
    """The ASE form."""
    from ase import Atoms

    return Atoms(
        structure.species, structure.positions, cell=structure.cell, pbc=structure.pbc.tolist()
    )
