"""Properties of tantalum for any ASE calculator, to put a model beside its teacher.

python properties.py                            # the teacher: table and teacher.json
python properties.py --model ta.hipnn           # teacher and model: table, JSON, plot

a0                  where the pressure of bcc vanishes
C11, C12, C44       stress under +-e along x, under a shear yz (symmetry holds bcc atoms in place)
bulk modulus        (C11 + 2 C12) / 3
vacancy formation   E(n - 1 atoms, relaxed) - (n - 1) E_bcc
surface energy      (E(n atoms, relaxed) - n E_bcc) / (2 area)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bcc100, bcc110, bulk
from ase.calculators.calculator import Calculator
from ase.optimize import FIRE

HERE = Path(__file__).parent

JOULE_PER_M2 = units.J / units.m**2

UNITS = {
    "a0": "Å",
    "cohesive_energy": "eV/atom",
    "C11": "GPa",
    "C12": "GPa",
    "C44": "GPa",
    "bulk_modulus": "GPa",
    "vacancy_formation_energy": "eV",
    "surface_energy_100": "J/m^2",
    "surface_energy_110": "J/m^2",
    "fcc_minus_bcc": "eV/atom",
}


def lattice_constant(calculator: Calculator, crystal: str = "bcc", guess: float = 3.316) -> float:
    """Return the cubic lattice constant (Å) where the pressure vanishes, by the secant method."""

    def pressure(a: float) -> float:
        atoms = bulk("Ta", crystal, a=a, cubic=True)
        atoms.calc = calculator
        return float(-atoms.get_stress()[:3].mean())

    a, b = guess, guess * 1.002
    p_a, p_b = pressure(a), pressure(b)
    for _ in range(30):
        a, b, p_a = b, b - p_b * (b - a) / (p_b - p_a), p_b
        p_b = pressure(b)
        if abs(b - a) < 1e-6 or p_a == p_b:
            return b
    raise RuntimeError(f"no zero pressure found for {crystal} near a = {guess} Å: last a = {b} Å")


def energy_per_atom(atoms: Atoms, calculator: Calculator) -> float:
    """Return the potential energy in eV/atom."""
    atoms = atoms.copy()
    atoms.calc = calculator
    return float(atoms.get_potential_energy()) / len(atoms)


def elastic_constants(calculator: Calculator, a0: float, size: float = 2e-3) -> dict[str, float]:
    """Return C11, C12, C44 and bulk modulus (GPa) by central differences of the stress."""

    def stress(strain: np.ndarray) -> np.ndarray:
        atoms = bulk("Ta", "bcc", a=a0, cubic=True)
        atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
        atoms.calc = calculator
        return np.array(atoms.get_stress())

    along_x = np.zeros((3, 3))
    along_x[0, 0] = size
    shear = np.zeros((3, 3))
    shear[1, 2] = shear[2, 1] = size / 2
    slope_x = (stress(along_x) - stress(-along_x)) / (2 * size * units.GPa)
    slope_shear = (stress(shear) - stress(-shear)) / (2 * size * units.GPa)
    c11, c12, c44 = float(slope_x[0]), float(slope_x[1:3].mean()), float(slope_shear[3])
    return {"C11": c11, "C12": c12, "C44": c44, "bulk_modulus": (c11 + 2 * c12) / 3}


def relaxed_energy(atoms: Atoms, calculator: Calculator, fmax: float = 0.005) -> float:
    """Return the energy (eV) after relaxing the positions in a fixed cell."""
    atoms = atoms.copy()
    atoms.calc = calculator
    with FIRE(atoms, logfile=None) as optimizer:
        if not optimizer.run(fmax=fmax, steps=400):
            raise RuntimeError(f"relaxation of {len(atoms)} atoms did not reach {fmax} eV/Å")
    return float(atoms.get_potential_energy())


def vacancy_formation_energy(calculator: Calculator, a0: float, repeat: int = 4) -> float:
    """Return E_f (eV) of one vacancy in a cubic supercell of 2 repeat^3 atoms."""
    atoms = bulk("Ta", "bcc", a=a0, cubic=True)
    per_atom = energy_per_atom(atoms, calculator)
    atoms *= (repeat,) * 3
    del atoms[0]
    return relaxed_energy(atoms, calculator) - len(atoms) * per_atom


def surface_energy(calculator: Calculator, a0: float, face: str) -> float:
    """Return the energy of the relaxed (100) or (110) surface in J/m^2."""
    maker, layers = {"100": (bcc100, 13), "110": (bcc110, 11)}[face]
    atoms = maker("Ta", (1, 1, layers), a=a0)
    atoms.center(vacuum=8.0, axis=2)
    atoms.pbc = True
    area = float(np.linalg.norm(np.cross(atoms.cell[0], atoms.cell[1])))
    per_atom = energy_per_atom(bulk("Ta", "bcc", a=a0, cubic=True), calculator)
    excess = relaxed_energy(atoms, calculator) - len(atoms) * per_atom
    return excess / (2 * area) / float(JOULE_PER_M2)


def measure(calculator: Calculator) -> dict[str, float]:
    """Return all properties of `UNITS`."""
    a0 = lattice_constant(calculator)
    bcc_energy = energy_per_atom(bulk("Ta", "bcc", a=a0), calculator)
    a_fcc = lattice_constant(calculator, "fcc", guess=4.22)
    fcc_energy = energy_per_atom(bulk("Ta", "fcc", a=a_fcc), calculator)
    return {
        "a0": a0,
        "cohesive_energy": energy_per_atom(Atoms("Ta"), calculator) - bcc_energy,
        **elastic_constants(calculator, a0),
        "vacancy_formation_energy": vacancy_formation_energy(calculator, a0),
        "surface_energy_100": surface_energy(calculator, a0, "100"),
        "surface_energy_110": surface_energy(calculator, a0, "110"),
        "fcc_minus_bcc": fcc_energy - bcc_energy,
    }


def curves(calculator: Calculator) -> dict[str, list[float]]:
    """Return E(volume) of bcc and fcc (Å^3/atom, eV/atom) and E(distance) of the dimer (Å, eV)."""
    volumes = np.linspace(13.5, 25.0, 60)
    distances = np.linspace(1.7, 6.0, 130)
    bcc = [bulk("Ta", "bcc", a=(2 * v) ** (1 / 3)) for v in volumes]
    fcc = [bulk("Ta", "fcc", a=(4 * v) ** (1 / 3)) for v in volumes]
    lone = energy_per_atom(Atoms("Ta"), calculator)
    dimers = [Atoms("Ta2", [[0, 0, 0], [0, 0, r]]) for r in distances]
    return {
        "volume": volumes.tolist(),
        "bcc": [energy_per_atom(atoms, calculator) for atoms in bcc],
        "fcc": [energy_per_atom(atoms, calculator) for atoms in fcc],
        "distance": distances.tolist(),
        "dimer": [2 * (energy_per_atom(atoms, calculator) - lone) for atoms in dimers],
    }


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw energy-volume and dimer curves of each named calculator to `path`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for k, (name, curve) in enumerate(found.items()):
        style = {"lw": 3, "alpha": 0.4} if k == 0 else {"lw": 1.2, "ls": "--"}
        for phase, color in (("bcc", "tab:blue"), ("fcc", "tab:orange")):
            left.plot(curve["volume"], curve[phase], color=color, label=f"{phase}, {name}", **style)
        right.plot(curve["distance"], curve["dimer"], color="tab:green", label=name, **style)
    left.set(xlabel="volume per atom / Å$^3$", ylabel="energy per atom / eV")
    right.set(xlabel="distance of the dimer / Å", ylabel="energy / eV", ylim=(-1, 6))
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(found: dict[str, dict[str, float]]) -> None:
    """Print a table: a row per property, a column per calculator."""
    from rich.console import Console
    from rich.table import Table

    table = Table("property", "unit", *found)
    for key, unit in UNITS.items():
        table.add_row(key, unit, *(f"{values[key]:.4g}" for values in found.values()))
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help=".hipnn file to put beside the teacher")
    parser.add_argument("--output", type=Path, help="JSON file; default teacher.json or MODEL.json")
    options = parser.parse_args(argv)
    from teacher import Teacher

    calculators: dict[str, Any] = {"teacher": Teacher()}
    output = options.output or HERE / "teacher.json"
    if options.model is not None:
        from md_plugin import HipnnCalculator

        calculators["model"] = HipnnCalculator(options.model)
        output = options.output or options.model.with_suffix(".json")
    found = {name: measure(calculator) for name, calculator in calculators.items()}
    show(found)
    content: dict[str, Any] = {"units": UNITS, **found}
    if options.model is not None:
        plot({name: curves(c) for name, c in calculators.items()}, output.with_suffix(".png"))
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
