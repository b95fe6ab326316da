"""Data: labelled structures from extended XYZ (or anything that ASE reads), ready for training.

    file --ase.io--> Dataset (structures, labels) --rcut--> one LabelledBatch per structure

Units are eV and Å. Energy and forces are required in every frame; stress is optional, frame by
frame (ASE's sign, eV/Å^3), and becomes the virial  W = -volume stress,  NaN where it is not known.
Neighbours are built once per structure and kept; a minibatch joins them without a new search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md_plugin.neighbours import Batch, Structure

FloatArray = NDArray[np.float64]


class DataError(ValueError):
    """A data file cannot be used; the message names file, frame and key."""


@dataclass(frozen=True)
class Keys:
    """Names of the labels in the file.

    Each is looked up in the results that ASE attached to the frame, then in ``atoms.info``
    (energy, stress) or ``atoms.arrays`` (forces).
    """

    energy: str = "energy"
    forces: str = "forces"
    stress: str = "stress"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled structures of one file.

    Attributes:
        path: where they came from.
        structures: the structures.
        energy: (n_structures,) eV.
        forces: one (n, 3) array per structure, eV/Å.
        stress: (n_structures, 3, 3) eV/Å^3, NaN where there is none.
        config_type: one name per structure, for tables ("" where the file has none).
        digest: SHA-256 of the file.
    """

    path: Path
    structures: list[Structure]
    energy: FloatArray
    forces: list[FloatArray]
    stress: FloatArray
    config_type: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """(n_structures,) atoms of each structure."""
        return np.array([len(s.species) for s in self.structures])

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(np.unique(np.concatenate([s.species for s in self.structures])).tolist())


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Structures with neighbours, and their labels (float64).

    Attributes:
        batch: species, pairs, r_ij.
        energy: (n_structures,) eV.
        forces: (n_atom, 3) eV/Å.
        virial: (n_structures, 3, 3) eV, NaN where unknown.
    """

    batch: Batch
    energy: Tensor
    forces: Tensor
    virial: Tensor

    @classmethod
    def join(cls, parts: Sequence[LabelledBatch]) -> LabelledBatch:
        """Concatenate."""
        return cls(
            Batch.join([p.batch for p in parts]),
            torch.cat([p.energy for p in parts]),
            torch.cat([p.forces for p in parts]),
            torch.cat([p.virial for p in parts]),
        )


def read_dataset(path: str | Path, keys: Keys | None = None) -> Dataset:
    """Read every frame of a file.

    Args:
        path: extended XYZ, or any format of ase.io.
        keys: names of the labels.

    Raises:
        DataError: unreadable, no frames, or a label is missing, of wrong shape or not finite.
    """
    import ase.io

    path, keys = Path(path), keys or Keys()
    if not path.is_file():
        raise DataError(f"data file {path} does not exist")
    try:
        frames = ase.io.read(path, index=":")
    except Exception as error:  # ase.io raises many kinds; the user needs the file's name
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not frames:
        raise DataError(f"{path} holds no frames")
    rows = [_read_frame(atoms, keys, f"{path}, frame {k}") for k, atoms in enumerate(frames)]
    structures, energy, forces, stress = zip(*rows, strict=True)
    return Dataset(
        path,
        list(structures),
        np.array(energy),
        list(forces),
        np.array(stress),
        [str(atoms.info.get("config_type", "")) for atoms in frames],
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _read_frame(
    atoms: Any, keys: Keys, where: str
) -> tuple[Structure, float, FloatArray, FloatArray]:
    n = len(atoms)
    if n == 0:
        raise DataError(f"{where}: no atoms")
    energy = _label(atoms, keys.energy, "energy", (), where)
    forces = _label(atoms, keys.forces, "forces", (n, 3), where)
    stress = _stress(atoms, keys.stress, where)
    structure = Structure(
        atoms.numbers.astype(np.int64), atoms.positions, atoms.cell.array, np.array(atoms.pbc)
    )
    if not np.isfinite(structure.positions).all():
        raise DataError(f"{where}: positions are not finite")
    return structure, float(energy), forces, stress


def _find(atoms: Any, key: str) -> Any:
    results = {} if atoms.calc is None else atoms.calc.results
    for store in (results, atoms.info, atoms.arrays):
        if key in store:
            return store[key]
    return None


def _label(atoms: Any, key: str, name: str, shape: tuple[int, ...], where: str) -> FloatArray:
    value = _find(atoms, key)
    if value is None:
        results = {} if atoms.calc is None else atoms.calc.results
        known = sorted({*results, *atoms.info, *atoms.arrays} - {"numbers", "positions"})
        raise DataError(
            f"{where}: no {name} under the key {key!r}; the frame has "
            f"{', '.join(known) or 'no labels'}. Set data: {name}_key"
        )
    array = np.asarray(value, dtype=np.float64)
    if array.shape != shape:
        raise DataError(f"{where}: {key!r} has shape {array.shape}, but {name} must have {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{where}: {key!r} is not finite")
    return array


def _stress(atoms: Any, key: str, where: str) -> FloatArray:
    value = _find(atoms, key)
    if value is None:
        return np.full((3, 3), np.nan)
    if not atoms.pbc.all():
        raise DataError(
            f"{where}: {key!r} is given, but the cell is not periodic in all three "
            "directions, so that stress has no meaning; remove it from this frame"
        )
    array = np.asarray(value, dtype=np.float64)
    if array.shape == (6,):  # Voigt order of ASE: xx, yy, zz, yz, xz, xy
        array = array[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if array.size != 9:
        raise DataError(
            f"{where}: {key!r} has shape {array.shape}, but stress must have (6,) "
            "(Voigt: xx yy zz yz xz xy) or (3, 3)"
        )
    if not np.isfinite(array).all():
        raise DataError(f"{where}: {key!r} is not finite")
    return array.reshape(3, 3)


def label_batches(dataset: Dataset, rcut: float) -> list[LabelledBatch]:
    """One labelled batch per structure, neighbours within rcut (Å) built."""
    batches = []
    for k, structure in enumerate(dataset.structures):
        try:
            batch = Batch.from_structures([structure], rcut)
        except ValueError as error:
            raise DataError(f"{dataset.path}, frame {k}: {error}") from error
        virial = -batch.volume[:, None, None] * torch.from_numpy(dataset.stress[k])
        energy = torch.tensor([dataset.energy[k]], dtype=torch.float64)
        batches.append(LabelledBatch(batch, energy, torch.from_numpy(dataset.forces[k]), virial))
    return batches


def minibatches(
    parts: Sequence[LabelledBatch], atoms_per_batch: int, seed: int | None = None
) -> Iterator[LabelledBatch]:
    """Join structures until a batch holds about `atoms_per_batch` atoms.

    Args:
        parts: one batch per structure.
        atoms_per_batch: a batch is closed before the structure that would exceed this.
        seed: order of the structures; None keeps the given order.
    """
    order = list(range(len(parts)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(parts), generator=generator).tolist()
    chosen: list[LabelledBatch] = []
    n_atoms = 0
    for k in order:
        n = parts[k].forces.shape[0]
        if chosen and n_atoms + n > atoms_per_batch:
            yield LabelledBatch.join(chosen)
            chosen, n_atoms = [], 0
        chosen.append(parts[k])
        n_atoms += n
    if chosen:
        yield LabelledBatch.join(chosen)


def closest_distance(parts: Sequence[LabelledBatch]) -> float | None:
    """The smallest distance between two atoms, Å; None without any pair."""
    found = [float(p.batch.r_ij.square().sum(1).min()) for p in parts if p.batch.pairs.n_pair]
    return float(np.sqrt(min(found))) if found else None


def fit_reference_energies(dataset: Dataset) -> dict[int, float]:
    """Energy of each species, eV: that of an isolated atom where the set has one, else a fit.

    Species without an isolated atom get the least-squares solution of
    ``energy = sum_species count * reference`` over all structures (smallest norm).
    """
    species = dataset.species
    reference = {}
    for structure, energy in zip(dataset.structures, dataset.energy, strict=True):
        if len(structure.species) == 1 and not np.any(structure.pbc):
            reference[int(structure.species[0])] = float(energy)
    rest = [z for z in species if z not in reference]
    if rest:
        counts = np.array([[np.sum(s.species == z) for z in species] for s in dataset.structures])
        known = np.array([reference.get(z, 0.0) for z in species])
        columns = counts[:, [species.index(z) for z in rest]]
        solution = np.linalg.lstsq(columns, dataset.energy - counts @ known, rcond=None)[0]
        reference.update(zip(rest, solution.tolist(), strict=True))
    return {z: reference[z] for z in species}
