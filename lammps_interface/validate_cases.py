"""Structures for comparing LAMMPS with Python, LAMMPS files of them, and the comparison itself.

Structures are made for a potential's elements and cutoff, off every symmetric place, with seeds:
the same potential gives the same structures. A difference is the largest absolute one, divided by

    energy           sum over atoms of |energy - reference energy|
    virial           sum over atoms of the largest component of the atom's virial
    centroid         sum of the atoms' centroid virials, against the virial: as virial. With one
                     interaction layer also atom by atom: the largest entry
    all the others   the largest entry; of atom energies without the reference energy

A sum may vanish although its terms do not, and rounding goes by the terms. Reference energies are
left out: they are large, and known to both sides alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from md_plugin.committee import Committee
from md_plugin.elements import SYMBOLS
from md_plugin.neighbours import Structure
from md_plugin.potential import Potential

FloatArray = NDArray[np.float64]
FCC = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
SIX = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])  # xx yy zz xy xz yz, LAMMPS's order
QUANTITIES = ("energy", "forces", "virial", "atom energy", "atom stress", "centroid")
NINE = ([0, 1, 2, 0, 0, 1, 1, 2, 2], [0, 1, 2, 1, 2, 2, 0, 0, 1])  # and yx zx zy
NOISE = 0.06  # of the distance between neighbours


@dataclass(frozen=True, eq=False)
class Case:
    """One structure to compare.

    Attributes:
        name: for tables.
        structure: periodic directions are LAMMPS's boundary p, others f; cell lower triangular.
        processors: LAMMPS's processor grid, "" lets LAMMPS choose.
    """

    name: str
    structure: Structure
    processors: str = ""


@dataclass(frozen=True, eq=False)
class Terms:
    """What is compared, of one structure.

    Attributes:
        energy: eV.
        forces: (n, 3) eV/Å.
        virial: (6,) eV, xx yy zz xy xz yz.
        atom_energy: (n,) eV.
        atom_virial: (n, 6) eV, half of each pair's to each of its atoms.
        centroid: (n, 9) eV, the atoms' virials by which heat flows; None where they are not known.
    """

    energy: float
    forces: FloatArray
    virial: FloatArray
    atom_energy: FloatArray
    atom_virial: FloatArray
    centroid: FloatArray | None = None


def make_cases(potential: Potential, ranks: int = 1) -> list[Case]:
    """The structures for one potential.

    Args:
        potential: its elements and cutoff say what is built.
        ranks: with more than one, one more structure leaves all ranks but the first empty.
    """
    d = neighbour_distance(potential)
    a, rcut = np.sqrt(2.0) * d, potential.rcut
    rng = np.random.default_rng(7)

    def case(name: str, x: FloatArray, cell: FloatArray, pbc: str = "ppp", grid: str = "") -> Case:
        noisy = x + rng.uniform(-NOISE, NOISE, x.shape) * d
        periodic = np.array([letter == "p" for letter in pbc])
        return Case(name, Structure(_mixed(potential, len(x), rng), noisy, cell, periodic), grid)

    block, layers = _fcc((2, 2, 2)) * a, _fcc((2, 2, 1)) * a
    cube = 2.0 * a * np.eye(3)
    strain = np.array([[1.03, 0.0, 0.0], [0.21, 0.98, 0.0], [-0.17, 0.24, 1.01]])
    slab = np.diag([2.0 * a, 2.0 * a, a + 3.0 * rcut])
    tall = np.diag([2.0 * a, 2.0 * a, max(ranks, 2) * (a + 2.0)])
    small = d * np.array([[2.0, 0, 0], [0.5, 0.75**0.5, 0], [0.5, 12**-0.5, (2 / 3) ** 0.5]])
    heap = d * np.array([[0, 0, 0], [1, 0, 0], [0.4, 0.9, 0], [0.5, 0.4, 0.9], [1.3, 0.9, 0.6]])
    far = np.vstack([heap + 0.2 * d, [[2.5 * rcut] * 3]])  # the last atom has no neighbour
    cases = [
        case("crystal", block, cube),
        case("triclinic, strained", block @ strain, cube @ strain),
        case("slab, free surfaces", layers + [0, 0, 0.3 * d], slab, "ppf"),
        case("cluster and lone atom", far, 5.0 * rcut * np.eye(3), "fff"),
        case("cell below the cutoff", np.array([[0.0, 0, 0], [d, 0, 0]]), small),
    ]
    if ranks > 1:
        # all atoms in the lowest of the slices that the grid cuts
        grid = f"1 1 {ranks}"
        cases.append(case("ranks without atoms", layers + [0, 0, 0.3 * d], tall, grid=grid))
    return cases


def neighbour_distance(potential: Potential) -> float:
    """Distance of neighbours, Å, at which an fcc mixture of the elements has its lowest energy.

    Half the cutoff where there is no minimum between 0.35 and 0.8 cutoffs. Never closer than the
    training data, if that is known, with room for the noise.
    """
    rcut = potential.rcut
    closest = float(potential.info.get("r_closest") or 0.0)
    low, high = max(0.35 * rcut, 1.25 * closest), 0.8 * rcut
    if low >= high:
        return max(0.5 * rcut, closest)
    tried = np.linspace(low, high, 16)
    species = _mixed(potential, 4, np.random.default_rng(7))
    cells = [np.sqrt(2.0) * d * np.eye(3) for d in tried]
    found = potential.evaluate(
        [Structure(species, FCC @ cell, cell, np.ones(3, dtype=bool)) for cell in cells],
        forces=False,
    )
    best = int(np.argmin(found.energy.cpu().numpy()))
    inside = 0 < best < len(tried) - 1
    return float(tried[best]) if inside else max(0.5 * rcut, low)


def _fcc(repeat: tuple[int, int, int]) -> FloatArray:
    """Places of an fcc block in units of the cubic cell, a little off the faces of the box."""
    cells = np.stack(np.meshgrid(*map(np.arange, repeat), indexing="ij"), -1).reshape(-1, 1, 3)
    places: FloatArray = (cells + FCC).reshape(-1, 3) + 0.02
    return places


def _mixed(potential: Potential, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Elements of the potential in turn, shuffled: each occurs where there is room."""
    return rng.permutation(np.resize(np.array(potential.species, dtype=np.int64), count))


def write_data(path: Path, structure: Structure, species: Sequence[int]) -> None:
    """Writes a LAMMPS data file.

    Args:
        path: file to write.
        structure: its cell is lower triangular.
        species: atomic number of each atom type.
    """
    cell = structure.cell
    lines = ["made by md-plugin", "", f"{len(structure.species)} atoms"]
    lines += [f"{len(species)} atom types", ""]
    lines += [f"0 {cell[k, k]:.17g} {axis}lo {axis}hi" for k, axis in enumerate("xyz")]
    tilt = cell[[1, 2, 2], [0, 0, 1]]
    if tilt.any():
        lines.append(" ".join(f"{t:.17g}" for t in tilt) + " xy xz yz")
    lines += ["", "Atoms # atomic", ""]
    for k, (z, r) in enumerate(zip(structure.species, structure.positions, strict=True)):
        place = " ".join(f"{value:.17g}" for value in r)
        lines.append(f"{k + 1} {list(species).index(int(z)) + 1} {place}")
    path.write_text("\n".join(lines) + "\n")


def element_names(species: Sequence[int]) -> str:
    """What pair_coeff wants: one symbol for each atom type."""
    return " ".join(SYMBOLS[z] for z in species)


def python_terms(potential: Potential, structure: Structure) -> Terms:
    """The same by Python."""
    found = potential.evaluate(structure)
    assert found.forces is not None and found.virial is not None and found.atom_virial is not None

    def plain(tensor: object) -> FloatArray:
        values: FloatArray = tensor.double().cpu().numpy()  # type: ignore[attr-defined]
        return values

    centroid = None
    if potential.n_exchanges == 0:
        # with more layers it takes a structure with explicit ghosts
        assert found.pair_gradient is not None
        moment = found.pair_gradient.new_zeros(found.pairs.n_pair, 3, 3)
        centroid = plain(replace(found, pair_moment=moment).centroid_virial)[:, NINE[0], NINE[1]]
    return Terms(
        float(found.energy[0]),
        plain(found.forces),
        plain(found.virial)[0][SIX],
        plain(found.atom_energy),
        plain(found.atom_virial)[:, SIX[0], SIX[1]],
        centroid,
    )


def differences(found: Terms, expected: Terms, reference: FloatArray) -> dict[str, float]:
    """Largest relative difference of each of `QUANTITIES`; inf where LAMMPS gave no number.

    Without "centroid" where LAMMPS was not asked for it.

    Args:
        found: by LAMMPS.
        expected: by Python; its terms are the scales.
        reference: (n,) reference energy of each atom, eV.
    """
    interaction = np.abs(expected.atom_energy - reference)
    terms = np.abs(expected.atom_virial).max(axis=1)
    pairs: dict[str, tuple[FloatArray | float, FloatArray | float, float]] = {
        "energy": (found.energy, expected.energy, interaction.sum()),
        "forces": (found.forces, expected.forces, np.abs(expected.forces).max()),
        "virial": (found.virial, expected.virial, terms.sum()),
        "atom energy": (found.atom_energy, expected.atom_energy, interaction.max()),
        "atom stress": (found.atom_virial, expected.atom_virial, terms.max()),
    }
    result = {name: _difference(*values) for name, values in pairs.items()}
    if found.centroid is not None:
        nine = expected.virial[[0, 1, 2, 3, 4, 5, 3, 4, 5]]
        result["centroid"] = _difference(found.centroid.sum(axis=0), nine, terms.sum())
        if expected.centroid is not None:
            scale = np.abs(expected.centroid).max()
            each = _difference(found.centroid, expected.centroid, scale)
            result["centroid"] = max(result["centroid"], each)
    return result


def _difference(found: FloatArray | float, expected: FloatArray | float, scale: float) -> float:
    worst = float(np.abs(np.asarray(found) - expected).max())
    return worst / (scale or 1.0) if np.isfinite(worst) else float("inf")


def reference_energies(potential: Potential, species: NDArray[np.int64]) -> FloatArray:
    """(n,) reference energy of each atom, eV; the members' mean of a committee."""
    if isinstance(potential, Committee):
        members = [reference_energies(member, species) for member in potential.members]
        mean: FloatArray = np.mean(members, axis=0)
        return mean
    found = np.zeros(len(species))
    for part in potential.model.parts:
        known = part.config.reference_energies or (0.0,) * len(part.species)
        table = dict(zip(part.species, known, strict=True))
        found += [table[int(z)] for z in species]
    return found
