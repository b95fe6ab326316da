"""Imported models with hippynn's own numbers beside them: no hippynn is needed to compare."""

import json
from pathlib import Path

import numpy as np
import pytest
from physics_suite import close

from md_plugin import load_model
from md_plugin.hippynn_io.settings import NETWORKS
from md_plugin.neighbours import Structure

FOLDER = Path(__file__).parent / "golden" / "hippynn"
RELATIVE = 1e-10  # float64, two orders of summation


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_of_hippynn(name):
    path = FOLDER / f"{name}.hipnn"
    assert path.stat().st_size < 30_000
    potential = load_model(path, device="cpu", dtype="float64")
    assert potential.info["origin"]["network"] == name
    assert potential.n_exchanges > 0
    labels = json.loads(path.with_suffix(".json").read_text())
    assert set(labels) == {"molecule", "crystal", "slab", "triclinic"}
    for label in labels.values():
        geometry = [np.array(label[key]) for key in ("species", "positions", "cell", "pbc")]
        found = potential.evaluate(Structure(*geometry))
        forces, strain = np.array(label["forces"]), np.array(label["strain"])
        close(found.energy, label["energy"], rtol=RELATIVE)
        close(found.forces, forces, atol=RELATIVE * np.abs(forces).max())
        close(found.virial[0], -strain, atol=RELATIVE * np.abs(strain).max())
