"""Wrote the golden files: `python tests/golden/make.py` when the format version has gone up.

A golden file is written once, by the version that introduced its format, and never again: it
shows that later versions still read it and compute the same.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


# What the newest format was introduced for.
KIND = {
    **{"order": 3, "n_max": 4, "n_gaussians": 5},
    **{"n_hidden": 4, "activation": "LeakyReLU(negative_slope=0.1)"},
}


def main():
    """Write format{N}.hipnn and format{N}.json, unless they are there."""
    from model_helpers import STRUCTURES, make_potential

    from md_plugin.checkpoint import FORMAT_VERSION, save_model

    potential = make_potential(**KIND, n_feat=3, n_nu=4, info={"r_closest": 0.75})
    labels = {}
    for name, make in STRUCTURES.items():
        s, result = make(), potential.evaluate(make())
        geometry = {"species": s.species, "positions": s.positions, "cell": s.cell, "pbc": s.pbc}
        labels[name] = {key: value.tolist() for key, value in geometry.items()}
        labels[name] |= {"energy": float(result.energy), "forces": result.forces.tolist()}
    stem = HERE / f"format{FORMAT_VERSION}"
    if stem.with_suffix(".hipnn").exists():
        raise SystemExit(f"{stem}.hipnn is there: golden files are never written again")
    save_model(stem.with_suffix(".hipnn"), potential)
    stem.with_suffix(".json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main()
