"""Wrote the models in `hippynn`: `python tests/golden/make_hippynn.py`.

One small model for each network class of hippynn, imported, with the energies and forces that
hippynn computes for it: so that tests compare with hippynn where it is not installed. Written
once; a model that is there is not written again.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# class -> number of a draw in hippynn_cases with several layers
CHOSEN = {"Hipnn": 4, "HipnnVec": 5, "HipnnQuad": 34, "HipHopnn": 7}


def main():
    """Write {class}.hipnn and {class}.json."""
    from hippynn_cases import Hippynn, draw_energy, hippynn_in_float64
    from model_helpers import STRUCTURES

    from md_plugin import from_hippynn, save_model

    folder = HERE / "hippynn"
    folder.mkdir(exist_ok=True)
    for name, number in CHOSEN.items():
        if (folder / f"{name}.hipnn").exists():
            continue
        with hippynn_in_float64():
            energy, options, kind = draw_energy(number)
            assert kind == name
            potential = from_hippynn(energy, dtype="float64", device="cpu", **options)
            theirs = Hippynn(energy)
            labels = {}
            for key, make in STRUCTURES.items():
                s, (total, forces, strain, _) = make(), theirs(make())
                arrays = {"species": s.species, "positions": s.positions, "cell": s.cell}
                arrays |= {"pbc": s.pbc, "forces": forces, "strain": strain}
                labels[key] = {k: v.tolist() for k, v in arrays.items()} | {"energy": total}
        save_model(folder / f"{name}.hipnn", potential)
        (folder / f"{name}.json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main()
