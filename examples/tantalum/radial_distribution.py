"""Radial distribution of the teacher for solid tantalum at 300 K, for `md-plugin demo`.

    python radial_distribution.py              # a minute and a half; writes ta_teacher_rdf.json

Langevin dynamics of 250 bcc atoms at the teacher's volume of zero pressure and 0 K; g(r) from
ase.geometry.rdf, averaged over frames. The conditions stand in the file beside the curve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.geometry.rdf import get_rdf
from make_dataset import draw_momenta, langevin
from properties import lattice_constant
from rich.progress import track

DATA = Path(__file__).parents[2] / "md_plugin" / "data" / "ta_teacher_rdf.json"

R_MAX, N_BINS = 6.5, 130

TIMESTEP = 2.0  # fs

EVERY = 20

FRICTION = 0.01  # 1/fs


def solid_rdf(
    calculator: Calculator, temperature: float, repeat: int, equilibration: int, steps: int
) -> dict[str, Any]:
    """Return r (Å), g(r) and the conditions of a run of 2 repeat^3 atoms."""
    rng = np.random.default_rng(0)
    atoms = bulk("Ta", "bcc", a=lattice_constant(calculator), cubic=True) * ((repeat,) * 3)
    atoms.calc = calculator
    draw_momenta(atoms, 2 * temperature, rng)  # half of it goes into the springs
    dynamics = langevin(atoms, TIMESTEP * units.fs, temperature, FRICTION / units.fs, rng)
    dynamics.run(equilibration)
    curves, measured = [], []
    for _ in track(range(steps // EVERY), description="teacher"):
        dynamics.run(EVERY)
        g, r = get_rdf(atoms, R_MAX, N_BINS)
        curves.append(g)
        measured.append(atoms.get_temperature())
    return {
        "what": "radial distribution of bcc tantalum, SNAP Ta06A with ZBL, made by "
        "examples/tantalum/radial_distribution.py",
        "temperature": temperature,
        "temperature_measured": float(np.mean(measured)),
        "volume_per_atom": atoms.get_volume() / len(atoms),
        "n_atoms": len(atoms),
        "timestep_fs": TIMESTEP,
        "equilibration_steps": equilibration,
        "steps": steps,
        "n_frames": len(curves),
        "thermostat": f"Langevin, {FRICTION} / fs",
        "units": {"r": "Å", "volume_per_atom": "Å^3", "temperature": "K"},
        "r": r.round(6).tolist(),
        "g": np.mean(curves, axis=0).round(5).tolist(),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--repeat", type=int, default=5, help="cubic cells along each side")
    parser.add_argument("--equilibration", type=int, default=500, help="steps")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args(argv)
    from teacher import Teacher

    found = solid_rdf(
        Teacher(), options.temperature, options.repeat, options.equilibration, options.steps
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
