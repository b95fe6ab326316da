"""Label the tantalum data set with the teacher and write train.xyz, valid.xyz and test.xyz.

    python make_dataset.py                     # about three minutes on one core
    python make_dataset.py --scale 0.05 --kinds strained dimer --output small

Each kind of cell has its own random stream (seed, kind): it comes out the same whatever else is
made. Each kind is split 80/10/10. Positions are rounded to 8 decimals and cells to 10 before they
are labelled: the stored energy belongs to the stored cell. A cell with a force component above
`MAX_FORCE` is dropped; for dimers and contacts, which fix the repulsive wall, the limit is
`MAX_FORCE_CLOSE`.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

import cells
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.nptberendsen import NPTBerendsen
from cells import Kind, Rng
from rich.progress import track
from teacher import Teacher

MAX_FORCE = 40.0
"""eV/Å; beyond it labels teach the steep wall and little else."""

SPLIT = {"train": 0.8, "valid": 0.1, "test": 0.1}

MAX_FORCE_CLOSE = 150.0
"""eV/Å, in dimers (to 1.6 Å) and contacts in the crystal (to 1.7 Å)."""

BULK_MODULUS = 190 * units.GPa


def solid(rng: Rng, scale: float, teacher: Teacher) -> Iterator[Atoms]:
    """54 bcc atoms at 300 to 3000 K and zero pressure, a snapshot each 0.16 ps."""
    for temperature in (300, 1000, 2000, 3000):
        atoms = cells.bcc((3, 3, 3), volume=1 + 2e-5 * temperature)
        yield from snapshots(atoms, temperature, cells.count(25, scale), rng, teacher)


def liquid(rng: Rng, scale: float, teacher: Teacher) -> Iterator[Atoms]:
    """54 atoms molten at 8000 K; 4000 and 3300 K at zero pressure; other densities at 4000 K."""
    atoms = cells.bcc((3, 3, 3), volume=1.2)
    melt(atoms, 8000, rng, teacher, steps=round(700 * min(1.0, scale)))
    for temperature in (4000, 3300):
        yield from snapshots(atoms, temperature, cells.count(20, scale), rng, teacher)
    for volume in (1.0, 1.35):
        other = atoms.copy()
        other.set_cell(
            other.cell * (volume * cells.VOLUME * 54 / other.get_volume()) ** (1 / 3),
            scale_atoms=True,
        )
        yield from snapshots(other, 4000, cells.count(6, scale), rng, teacher, fixed=True)


def melt(atoms: Atoms, temperature: float, rng: Rng, teacher: Teacher, steps: int) -> None:
    """Run Langevin dynamics at constant volume, in place."""
    atoms.calc = teacher
    draw_momenta(atoms, temperature, rng)
    langevin(atoms, 1.5 * units.fs, temperature, 0.05 / units.fs, rng).run(steps)


def draw_momenta(atoms: Atoms, temperature: float, rng: Rng) -> None:
    """Set momenta from the Maxwell-Boltzmann distribution, total momentum zero."""
    momenta = (
        rng.normal(size=(len(atoms), 3))
        * np.sqrt(atoms.get_masses() * units.kB * temperature)[:, None]
    )
    atoms.set_momenta(momenta - momenta.mean(axis=0))


def langevin(atoms: Atoms, step: float, temperature: float, friction: float, rng: Rng) -> Langevin:
    """Return Langevin dynamics with a free centre of mass (holding it biases the temperature)."""
    return Langevin(atoms, step, temperature_K=temperature, friction=friction, rng=rng, fixcm=False)


def snapshots(
    atoms: Atoms, temperature: float, n: int, rng: Rng, teacher: Teacher, fixed: bool = False
) -> Iterator[Atoms]:
    """Equilibrate for 0.8 ps, then yield `n` snapshots 0.16 ps apart; volume held if `fixed`."""
    atoms.calc = teacher
    step = 2.0 * units.fs
    draw_momenta(atoms, temperature, rng)
    if fixed:
        dynamics = langevin(atoms, step, temperature, 0.01 / units.fs, rng)
    else:
        dynamics = NPTBerendsen(
            atoms,
            step,
            temperature_K=temperature,
            pressure_au=0.0,
            taut=100 * units.fs,
            taup=500 * units.fs,
            compressibility_au=1 / BULK_MODULUS,
        )
    dynamics.run(400 if n > 2 else 20)
    for _unused in range(n):
        dynamics.run(80 if n > 2 else 20)
        yield Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


KINDS: dict[str, Kind] = {
    "isolated": cells.isolated,
    "strained": cells.strained,
    "perturbed": cells.perturbed,
    "phases": cells.phases,
    "surfaces": cells.surfaces,
    "shifted": cells.shifted,
    "dimer": cells.dimer,
    "trimer": cells.trimer,
    "cluster": cells.cluster,
    "contacts": cells.contacts,
    "vacancies": cells.vacancies,
    "interstitials": cells.interstitials,
    "solid": solid,
    "liquid": liquid,
}

LIMITS = {"dimer": MAX_FORCE_CLOSE, "contacts": MAX_FORCE_CLOSE}


def label(atoms: Atoms, kind: str, teacher: Teacher) -> Atoms | None:
    """Return the labelled cell, or None if a force is beyond the threshold of its kind."""
    pbc = atoms.pbc
    labelled = Atoms(
        atoms.numbers, atoms.positions.round(8), cell=atoms.cell.array.round(10), pbc=pbc
    )
    labelled.info["config_type"] = kind
    teacher.calculate(labelled)
    results = teacher.results
    if np.abs(results["forces"]).max() > LIMITS.get(kind, MAX_FORCE):
        return None
    results = {key: results[key] for key in ("energy", "forces", "stress") if key in results}
    labelled.calc = SinglePointCalculator(labelled, **results)
    return labelled


def split(cells_of_kind: list[Atoms], rng: Rng) -> dict[str, list[Atoms]]:
    """Deal the cells of one kind to train, valid and test at random; a lone cell goes to train."""
    order = rng.permutation(len(cells_of_kind))
    n_valid = round(SPLIT["valid"] * len(order))
    n_test = round(SPLIT["test"] * len(order))
    ids = {
        "valid": order[:n_valid],
        "test": order[n_valid : n_valid + n_test],
        "train": order[n_valid + n_test :],
    }
    return {name: [cells_of_kind[k] for k in sorted(part)] for name, part in ids.items()}


def make(kinds: list[str], seed: int, scale: float) -> dict[str, list[Atoms]]:
    """Make and label all cells; return them by split."""
    teacher, labeller = Teacher(), Teacher()
    parts: dict[str, list[Atoms]] = {name: [] for name in SPLIT}
    for kind in kinds:
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
        found = track(KINDS[kind](rng, scale, teacher), description=f"{kind:14s}", total=None)
        labelled = [label(atoms, kind, labeller) for atoms in found]
        kept = [atoms for atoms in labelled if atoms is not None]
        for name, part in split(kept, rng).items():
            parts[name] += part
    return parts


def summary(parts: dict[str, list[Atoms]]) -> str:
    """Return a Markdown table: kind, cells, atoms, energy range, largest force component."""
    rows = [
        "| kind | cells | atoms | energy, eV/atom | largest force, eV/Å |",
        "| --- | --- | --- | --- | --- |",
    ]
    everything = [atoms for part in parts.values() for atoms in part]
    for kind in dict.fromkeys(atoms.info["config_type"] for atoms in everything):
        rows.append(
            _row(kind, [atoms for atoms in everything if atoms.info["config_type"] == kind])
        )
    return "\n".join([*rows, _row("all", everything)])


def _row(name: str, found: list[Atoms]) -> str:
    energy = [atoms.get_potential_energy() / len(atoms) for atoms in found]
    force = max(np.abs(atoms.get_forces()).max() for atoms in found)
    n_atoms = sum(map(len, found))
    span = f"{min(energy):.3f} to {max(energy):.3f}"
    return f"| {name} | {len(found)} | {n_atoms} | {span} | {force:.1f} |"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "data", help="folder to write to"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of cells")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    parts = make(options.kinds, options.seed, options.scale)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write(options.output / f"{name}.xyz", part, format="extxyz")
    print(summary(parts))


if __name__ == "__main__":
    main()
