"""`python hippynn_training.py FOLDER [SEED]`: trains with hippynn itself, as its examples do.

A few epochs on energies and forces of ASE's EMT potential for AlCu alloys. Leaves in FOLDER what
hippynn leaves: experiment_structure.pt, best_model.pt, best_checkpoint.pt ...; and beside it what
its users save by hand: graph.pt (a GraphModule), mliap.pt and mliap.pickle (ML-IAP interfaces),
and expected.npz with energy and forces that hippynn's own ASE calculator gives for one structure.
"""

import os
import pickle
import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")

import torch  # noqa: E402
from ase.build import bulk  # noqa: E402
from ase.calculators.emt import EMT  # noqa: E402

FRAMES, EPOCHS = 12, 3
KWARGS = {
    "n_features": 6,
    "n_sensitivities": 8,
    "dist_soft_min": 1.6,
    "dist_soft_max": 4.0,
    "dist_hard_max": 4.5,
    "n_interaction_layers": 2,
    "n_atom_layers": 1,
}


def alloy(seed):
    """A cube of 32 atoms, a quarter of them copper, off their sites."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Al", cubic=True) * (2, 2, 2)
    atoms.numbers[rng.permutation(len(atoms))[:8]] = 29
    atoms.rattle(0.1, rng=rng)
    return atoms


def database(names):
    """hippynn's database of labelled alloys; `names` are those of inputs and targets."""
    from hippynn.databases import Database

    frames = [alloy(k) for k in range(FRAMES)]
    for atoms in frames:
        atoms.calc = EMT()
    arrays = {
        "Z": np.array([a.numbers for a in frames]),
        "R": np.array([a.positions for a in frames]),
        "C": np.array([np.asarray(a.cell) for a in frames]),
        "E": np.array([[a.get_potential_energy()] for a in frames]),
        "F": np.array([a.get_forces() for a in frames]),
    }
    arrays = {k: v.astype(np.int64 if k == "Z" else np.float32) for k, v in arrays.items()}
    base = Database(arr_dict=arrays, seed=0, quiet=True, pin_memory=False, **names)
    base.make_random_split("test", 2)
    base.make_random_split("valid", 2)
    base.split_the_rest("train")
    return base


def graph():
    """Nodes of the energy and of the loss, as in hippynn's examples."""
    from hippynn.graphs import inputs, loss, networks, physics, targets

    species = inputs.SpeciesNode(db_name="Z")
    positions, cell = inputs.PositionsNode(db_name="R"), inputs.CellNode(db_name="C")
    settings = {"possible_species": [0, 29, 13], **KWARGS}
    network = networks.HipnnVec(
        "HIPNN", (species, positions, cell), module_kwargs=settings, periodic=True
    )
    energy = targets.HEnergyNode("HEnergy", network, db_name="E")
    force = physics.GradientNode("forces", (energy, positions), sign=-1, db_name="F")
    error = loss.MSELoss.of_node(energy) + 10 * loss.MSELoss.of_node(force)
    mae = {"E-MAE": loss.MAELoss.of_node(energy), "F-MAE": loss.MAELoss.of_node(force)}
    return energy, error, {**mae, "loss": error}


def main(folder, seed=0):
    """Train, and save in all the ways."""
    from hippynn import custom_kernels
    from hippynn.experiment import SetupParams, assemble_for_training, setup_and_train
    from hippynn.graphs import GraphModule, get_subgraph
    from hippynn.graphs.nodes.base import InputNode
    from hippynn.interfaces.ase_interface import HippynnCalculator
    from hippynn.interfaces.lammps_interface import MLIAPInterface
    from hippynn.pretraining import hierarchical_energy_initialization

    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    torch.manual_seed(seed)
    energy, error, metrics = graph()
    modules, names = assemble_for_training(error, metrics)
    base = database(names)
    hierarchical_energy_initialization(energy, base, trainable_after=False)
    setup_and_train(
        training_modules=modules,
        database=base,
        setup_params=SetupParams(
            stopping_key="loss",
            batch_size=4,
            optimizer=torch.optim.Adam,
            max_epochs=EPOCHS,
            learning_rate=1e-3,
            device="cpu",
            fraction_train_eval=1.0,
        ),
    )
    nodes = get_subgraph([energy])
    torch.save(
        GraphModule([n for n in nodes if isinstance(n, InputNode)], [energy.main_output]),
        "graph.pt",
    )
    interface = MLIAPInterface(energy, ["Al", "Cu"], compute_dtype=torch.float64)
    torch.save(interface, "mliap.pt")
    with open("mliap.pickle", "wb") as stream:
        pickle.dump(interface, stream)
    custom_kernels.set_custom_kernels("_legacy")  # the others leave the smallest terms out
    atoms = alloy(100)
    atoms.calc = HippynnCalculator(energy, en_unit=1.0)
    atoms.calc.to(torch.float64)
    np.savez("expected.npz", energy=float(atoms.get_potential_energy()), forces=atoms.get_forces())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
