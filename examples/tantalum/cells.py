"""Cells for the tantalum data set, one generator per kind; kinds that ask the teacher come last.

Each generator has the signature (rng, scale, teacher) -> iterator of Atoms without labels. `scale`
multiplies the number of cells (at least one of each sort stays). Lengths in Å, volumes relative to
bcc at equilibrium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from ase import Atoms
from ase.build import bcc100, bcc110, bcc111, bulk
from ase.optimize import FIRE
from teacher import Teacher

A_BCC = 3.316
"""bcc lattice constant of the teacher, Å; the volumes of the other phases follow from it."""

VOLUME = A_BCC**3 / 2

Rng = np.random.Generator
Kind = Callable[[Rng, float, Teacher], Iterator[Atoms]]


def count(n: int, scale: float) -> int:
    """Return how many cells to make of a sort that has `n` at scale 1."""
    return max(1, round(n * scale))


def bcc(repeat: tuple[int, int, int] = (1, 1, 1), volume: float = 1.0) -> Atoms:
    """Return a cubic bcc supercell with `volume` relative to equilibrium."""
    return bulk("Ta", "bcc", a=A_BCC * volume ** (1 / 3), cubic=True) * repeat


def strain(atoms: Atoms, rng: Rng, size: float) -> Atoms:
    """Apply a random symmetric strain whose largest component is `size`."""
    eps = rng.normal(size=(3, 3))
    eps = eps + eps.T
    eps *= size / np.abs(eps).max()
    atoms.set_cell(atoms.cell @ (np.eye(3) + eps), scale_atoms=True)
    return atoms


def perturb(atoms: Atoms, rng: Rng, rms: float) -> Atoms:
    """Displace each atom by a Gaussian of root mean square length `rms`."""
    atoms.positions += rng.normal(scale=rms / np.sqrt(3), size=atoms.positions.shape)
    return atoms


def turn(atoms: Atoms, rng: Rng) -> Atoms:
    """Rotate a molecule at random."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    atoms.positions = atoms.positions @ (q * np.sign(np.diag(r)))
    return atoms


def strained(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """bcc without displacements: volumes, small strains (elastic constants), large strains."""
    for volume in np.linspace(0.70, 1.40, count(36, scale)):
        yield bcc(volume=volume)
    for _unused in range(count(40, scale)):
        yield strain(bcc(), rng, rng.uniform(0.001, 0.015))
    modes = np.zeros((3, 3, 3))
    modes[0, 0, 0] = 1.0
    modes[1, 0, 1] = modes[1, 1, 0] = 0.5
    modes[2] = np.diag([-0.5, -0.5, 1.0])
    for mode in modes:
        for size in np.linspace(-0.08, 0.08, count(12, scale)):
            atoms = bcc()
            atoms.set_cell(atoms.cell @ (np.eye(3) + size * mode), scale_atoms=True)
            yield atoms
    for _unused in range(count(40, scale)):
        yield strain(bcc(volume=rng.uniform(0.88, 1.14)), rng, rng.uniform(0.02, 0.07))


def perturbed(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """bcc supercells of 16, 54, 128 atoms, displaced by 0.02 to 0.5 Å, half of them strained."""
    for size, n in ((2, 60), (3, 50), (4, 7)):
        for k in range(count(n, scale)):
            atoms = bcc((size,) * 3, volume=rng.uniform(0.90, 1.10) if k % 2 else 1.0)
            if k % 2:
                strain(atoms, rng, rng.uniform(0.0, 0.04))
            yield perturb(atoms, rng, np.exp(rng.uniform(np.log(0.02), np.log(0.5))))


def phases(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """fcc, hcp, A15, simple cubic, diamond: cells over volumes, then displaced supercells."""
    sorts = ("fcc", "hcp", "a15", "sc", "diamond")
    for name in sorts:
        for volume in np.linspace(0.80, 1.35, count(13, scale)):
            yield phase(name, volume)
    supercell = {
        "fcc": (2, 2, 2),
        "hcp": (2, 2, 2),
        "a15": (2, 2, 1),
        "sc": (3, 3, 2),
        "diamond": (2, 1, 1),
    }
    for name in sorts:
        for _unused in range(count(13, scale)):
            atoms = phase(name, rng.uniform(0.88, 1.18)) * supercell[name]
            strain(atoms, rng, rng.uniform(0.0, 0.04))
            yield perturb(atoms, rng, rng.uniform(0.03, 0.4))


def phase(name: str, volume: float) -> Atoms:
    """Return the conventional cell of a phase; `volume` 1 is roughly its own equilibrium."""
    per_atom = VOLUME * volume
    if name == "fcc":
        return bulk("Ta", "fcc", a=(4 * per_atom * 1.03) ** (1 / 3), cubic=True)
    if name == "hcp":
        a = (2 * per_atom * 1.03 / (np.sqrt(0.75) * 1.633)) ** (1 / 3)
        return bulk("Ta", "hcp", a=a, c=1.633 * a)
    if name == "sc":
        return bulk("Ta", "sc", a=(per_atom * 1.1) ** (1 / 3))
    if name == "diamond":
        return bulk("Ta", "diamond", a=(8 * per_atom * 1.35) ** (1 / 3), cubic=True)
    a15 = [[0, 0, 0], [0.5, 0.5, 0.5]]
    for k in range(3):
        for sign in (0.25, 0.75):
            a15.append(np.roll([sign, 0.0, 0.5], k).tolist())
    a = (8 * per_atom * 1.01) ** (1 / 3)
    return Atoms("Ta8", scaled_positions=a15, cell=[a] * 3, pbc=True)


def surfaces(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """(100), (110), (111) slabs, periodic in the plane, strained and displaced."""
    makers = ((bcc100, (5, 7, 9)), (bcc110, (4, 5, 7)), (bcc111, (9, 12, 15)))
    for maker, layers in makers:
        for k in range(count(17, scale)):
            width = 1 if k % 3 == 0 else 2
            atoms = maker("Ta", (width, width, int(rng.choice(layers))), a=A_BCC)
            atoms.center(vacuum=7.0, axis=2)
            atoms.pbc = (True, True, False)
            if k > 0:
                atoms.cell[:2] *= rng.uniform(0.97, 1.03)
                atoms.positions *= [1, 1, rng.uniform(0.96, 1.04)]
                perturb(atoms, rng, rng.uniform(0.0, 0.35))
            yield atoms


def shifted(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """Two (110) halves shifted along the plane and pulled apart: generalised stacking faults."""
    for k in range(count(30, scale)):
        atoms = bcc110("Ta", (1, 1, 8) if k % 2 else (1, 2, 8), a=A_BCC, orthogonal=k % 2 == 0)
        spacing = A_BCC / np.sqrt(2)
        cell = np.array(atoms.cell)
        cell[2] = [0, 0, 8 * spacing]
        atoms.set_cell(cell)
        atoms.pbc = True
        shift = rng.uniform() * cell[0] + rng.uniform() * cell[1] + [0, 0, rng.uniform(0.0, 0.6)]
        atoms.set_cell(cell + np.outer([0, 0, 1], shift))
        yield perturb(atoms, rng, rng.uniform(0.0, 0.2))


def isolated(_rng: Rng, _scale: float, _: Teacher) -> Iterator[Atoms]:
    """One atom alone."""
    yield Atoms("Ta")


def dimer(_rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """Two atoms from 1.6 to 4.8 Å."""
    for r in np.linspace(1.6, 4.8, count(49, scale)):
        yield Atoms("Ta2", [[0, 0, 0], [0, 0, r]])


def trimer(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """Three atoms with two sides of 2.0 to 4.6 Å and an angle of 50 to 180 degrees."""
    for _unused in range(count(40, scale)):
        r1, r2 = rng.uniform(2.0, 4.6, size=2)
        angle = np.radians(rng.uniform(50, 180))
        yield turn(
            Atoms("Ta3", [[0, 0, 0], [r1, 0, 0], [r2 * np.cos(angle), r2 * np.sin(angle), 0]]), rng
        )


def random_points(rng: Rng, n_atoms: int, cell: np.ndarray, pbc: bool, closest: float) -> Atoms:
    """Place atoms at random, none closer than `closest`, which shrinks when space runs out."""
    atoms = Atoms(cell=cell, pbc=pbc)
    while len(atoms) < n_atoms:
        for _unused in range(200):
            trial = atoms + Atoms("Ta", [rng.uniform(size=3) @ cell])
            if (
                len(trial) == 1
                or trial.get_distances(-1, range(len(atoms)), mic=pbc).min() > closest
            ):
                atoms = trial
                break
        else:
            closest *= 0.98
    return atoms


def cluster(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """4 to 20 atoms without periodicity: random ones, and balls cut from bcc and displaced."""
    for k in range(count(40, scale)):
        n_atoms = int(rng.integers(4, 21))
        if k % 2:
            edge = (n_atoms * VOLUME * rng.uniform(0.8, 1.5)) ** (1 / 3)
            yield random_points(rng, n_atoms, np.eye(3) * edge, False, rng.uniform(2.2, 2.7))
        else:
            atoms = bcc((4, 4, 4))
            centre = atoms.cell.sum(axis=0) / 2 + rng.uniform(-1, 1, size=3)
            near = np.argsort(np.linalg.norm(atoms.positions - centre, axis=1))[:n_atoms]
            yield perturb(Atoms("Ta" * n_atoms, atoms.positions[near]), rng, rng.uniform(0.05, 0.5))


def contacts(rng: Rng, scale: float, _: Teacher) -> Iterator[Atoms]:
    """Two neighbours in a displaced crystal pushed to 1.7 to 2.5 Å: repulsion in a dense place."""
    for _unused in range(count(80, scale)):
        atoms = perturb(bcc((2, 2, 2), volume=rng.uniform(0.92, 1.1)), rng, rng.uniform(0.05, 0.25))
        i = int(rng.integers(len(atoms)))
        distances = atoms.get_distances(i, range(len(atoms)), mic=True)
        distances[i] = np.inf
        j = int(np.argmin(distances))
        atoms.set_distance(i, j, rng.uniform(1.7, 2.5), fix=0.5, mic=True)
        yield atoms


def relaxation(atoms: Atoms, teacher: Teacher, every: int, steps: int = 40) -> list[Atoms]:
    """Relax positions with the teacher; return snapshots along the path, the relaxed cell last."""
    atoms = atoms.copy()
    atoms.calc = teacher
    path: list[Atoms] = []
    with FIRE(atoms, logfile=None, dt=0.05) as optimizer:
        optimizer.attach(lambda: path.append(atoms.copy()), interval=every)
        optimizer.run(fmax=0.01, steps=steps)
    return [*path, atoms.copy()]


def vacancies(rng: Rng, scale: float, teacher: Teacher) -> Iterator[Atoms]:
    """One or two atoms removed: relaxing, displaced, an atom jumping into the vacancy."""
    sorts = (
        ((3, 3, 3), [0], 22),
        ((4, 4, 4), [0], 6),
        ((3, 3, 3), [0, 1], 11),
        ((4, 4, 4), [0, 2], 5),
    )
    for repeat, remove, n in sorts:
        atoms = bcc(repeat)
        del atoms[remove]
        path = relaxation(atoms, teacher, every=12)
        yield from path[: count(len(path), scale)]
        for _unused in range(count(n, scale)):
            yield perturb(strain(path[-1].copy(), rng, 0.01), rng, rng.uniform(0.03, 0.35))
    for fraction in np.linspace(0.1, 0.9, count(14, scale)):
        atoms = bcc((3, 3, 3))
        near = int(np.argmin(np.linalg.norm(atoms.positions - A_BCC / 2, axis=1)))
        atoms.positions[near] *= 1 - fraction
        del atoms[0]
        yield perturb(atoms, rng, 0.1)


def interstitials(rng: Rng, scale: float, teacher: Teacher) -> Iterator[Atoms]:
    """Dumbbells along <100>, <110>, <111>, octahedral, tetrahedral sites: relaxing, displaced."""
    centre = np.full(3, A_BCC * 1.5)
    axes = [np.array(v) / np.linalg.norm(v) for v in ((1, 0, 0), (1, 1, 0), (1, 1, 1))]
    starts = [[centre - axis * 1.1, centre + axis * 1.1] for axis in axes]
    starts += [[centre, centre + np.array(v) * A_BCC] for v in ((0.5, 0, 0), (0.5, 0.25, 0))]
    for start in starts:
        atoms = bcc((3, 3, 3))
        del atoms[int(np.argmin(np.linalg.norm(atoms.positions - centre, axis=1)))]
        atoms += Atoms("Ta2", start)
        path = relaxation(atoms, teacher, every=8)
        yield from path[: count(len(path), scale)]
        for _unused in range(count(5, scale)):
            yield perturb(path[-1].copy(), rng, rng.uniform(0.03, 0.3))
