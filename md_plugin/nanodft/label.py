"""Labels a file of molecules: geometries in, geometries with energies and forces out.

    in.xyz -> out.xyz (energy, forces, dipole where ASE looks for them; info nanodft_*)
           -> out.xyz.failed.jsonl (one line {"frame": ..., "reason": ...} for each that failed)

Each frame ends up in exactly one of the two, in the order of the input. A frame is appended by one
write that is forced to disk; if a kill cuts the last one, resuming removes the piece and computes
the frame again. `nanodft_frame` is the number of a frame in the input, from 0.
"""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import InputError
from ase.calculators.singlepoint import SinglePointCalculator

from md_plugin import __version__
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.calculator import check_isolated
from md_plugin.nanodft.checks import Settings
from md_plugin.nanodft.errors import UnsupportedSystem
from md_plugin.nanodft.molecule import Molecule, Result
from md_plugin.nanodft.scf import ConvergenceError

# What is wrong with one frame says nothing about the next.
FRAME_ERRORS = (ValueError, MemoryError, InputError, ConvergenceError)
_N_MOLECULES = 8  # compositions whose tables and last density are kept
_WRITTEN = 1e-6  # Å; extended XYZ holds eight decimals


class LabelError(ValueError):
    """The input or output file cannot be used; nothing was written."""


class Labelling:
    """A run over a file; iterate over it to compute.

    Args:
        source: anything that ase.io reads.
        target: extended XYZ to write.
        settings: the method; a frame's own integer info["charge"] replaces its charge.
        resume: go on where an earlier run with the same input and method stopped.

    Attributes:
        frames: the molecules.
        failed: frame -> reason, of earlier runs and this one.
        todo: frames that are left when the run begins.

    Raises:
        LabelError: unreadable or empty input; an output that exists (without resume), belongs to
            another input or method, or cannot be written.
        UnsupportedSystem: no element of the file has this basis set.
    """

    def __init__(
        self, source: Path | str, target: Path | str, settings: Settings, *, resume: bool = False
    ):
        self.target, self.settings = Path(target), settings
        self.failures = Path(f"{target}.failed.jsonl")
        self.frames = _read(Path(source))
        _check_basis(self.frames, settings.basis)
        self.failed: dict[int, str] = {}
        labelled: set[int] = set()
        for path in (self.target, self.failures):
            if path.exists() and not resume:
                raise LabelError(f"{path} exists; --resume goes on with it")
        if resume and self.target.exists():
            labelled = self._recover_labels()
        if resume and self.failures.exists():
            self.failed = self._recover_failures()
        done = labelled | self.failed.keys()
        self.todo = [k for k in range(len(self.frames)) if k not in done]
        self._molecules: OrderedDict[tuple[object, ...], _Known] = OrderedDict()
        _append(self.target, "")  # says now whether it can be written

    def __len__(self) -> int:
        return len(self.todo)

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        """(frame, None, or the reason why it failed), once the frame is on disk."""
        for k in self.todo:
            try:
                text = self._label(k)
            except FRAME_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                self.failed[k] = reason
                _append(self.failures, json.dumps({"frame": k, "reason": reason}) + "\n")
            else:
                _append(self.target, text)
            yield k, self.failed.get(k)

    def _label(self, k: int) -> str:
        """The frame with its labels, as extended XYZ."""
        atoms = self.frames[k]
        check_isolated(atoms)
        settings = self._settings_of(atoms)
        known = self._known(atoms, settings)
        result = known.molecule.evaluate(atoms.positions, known.last)
        known.last = result.dm
        return _written(atoms, k, result, settings.method)

    def _settings_of(self, atoms: Atoms) -> Settings:
        charge = atoms.info.get("charge", self.settings.charge)
        if charge != int(charge):
            raise ValueError(f"charge must be an integer, got {charge!r}")
        return replace(self.settings, charge=int(charge))

    def _known(self, atoms: Atoms, settings: Settings) -> _Known:
        key = (settings.charge, *atoms.numbers.tolist())
        if key not in self._molecules:
            self._molecules[key] = _Known(Molecule(atoms.numbers, settings))
            if len(self._molecules) > _N_MOLECULES:
                self._molecules.popitem(last=False)
        self._molecules.move_to_end(key)
        return self._molecules[key]

    def _recover_labels(self) -> set[int]:
        _cut_incomplete_frame(self.target)
        labelled: set[int] = set()
        if not self.target.stat().st_size:
            return labelled
        for atoms in ase.io.read(self.target, index=":", format="extxyz"):
            k = int(atoms.info.get("nanodft_frame", -1))
            if not 0 <= k < len(self.frames) or k in labelled or not _same(atoms, self.frames[k]):
                raise LabelError(f"{self.target} does not belong to this input: frame {k} differs")
            made, wanted = atoms.info["nanodft_method"], self._settings_of(self.frames[k]).method
            if made != wanted:
                raise LabelError(f"{self.target} was made with {made}, but this run is {wanted}")
            labelled.add(k)
        return labelled

    def _recover_failures(self) -> dict[int, str]:
        text = self.failures.read_text()
        complete = text[: text.rfind("\n") + 1]
        os.truncate(self.failures, len(complete.encode()))
        try:
            rows = [json.loads(line) for line in complete.splitlines()]
            return {int(row["frame"]): str(row["reason"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise LabelError(f"{self.failures} is damaged: {error}") from error


class _Known:
    """A composition and the last density that was found for it."""

    def __init__(self, molecule: Molecule):
        self.molecule = molecule
        self.last: np.ndarray | None = None


def _read(source: Path) -> list[Atoms]:
    if not source.is_file():
        raise LabelError(f"input {source} does not exist")
    try:
        frames: list[Atoms] = ase.io.read(source, index=":")
    except Exception as error:  # ase.io raises many kinds; the user needs the file's name
        raise LabelError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
    if not frames:
        raise LabelError(f"{source} holds no frames")
    return frames


def _check_basis(frames: list[Atoms], name: str) -> None:
    """Raise UnsupportedSystem if no element has the set: then it is the name that is wrong."""
    numbers = sorted({int(z) for atoms in frames for z in atoms.numbers if 1 <= z})
    for number in numbers:
        try:
            Basis.build([number], name)
            return
        except UnsupportedSystem:
            if number == numbers[-1]:
                raise


def _written(atoms: Atoms, k: int, result: Result, method: str) -> str:
    labelled = atoms.copy()
    labelled.info |= {
        "nanodft_frame": k,
        "nanodft_method": method,
        "nanodft_converged": result.converged,
        "nanodft_iter": result.n_iter,
        "nanodft_version": __version__,
    }
    labelled.calc = SinglePointCalculator(
        labelled, energy=result.energy, forces=result.forces, dipole=result.dipole
    )
    text = io.StringIO()
    ase.io.write(text, labelled, format="extxyz")
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    try:
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LabelError(f"{path} cannot be written: {error.strerror}") from error


def _cut_incomplete_frame(path: Path) -> None:
    """Remove what a kill left of a frame at the end of an extended XYZ file."""
    lines = path.read_bytes().splitlines(keepends=True)
    start = kept = 0
    while start < len(lines):
        try:
            stop = start + 2 + int(lines[start])
        except ValueError as error:
            raise LabelError(f"{path} is damaged in line {start + 1}") from error
        if stop > len(lines) or not lines[stop - 1].endswith(b"\n"):
            break
        kept += sum(map(len, lines[start:stop]))
        start = stop
    os.truncate(path, kept)


def _same(a: Atoms, b: Atoms) -> bool:
    same = len(a) == len(b) and bool((a.numbers == b.numbers).all())
    return same and bool((abs(a.positions - b.positions) < _WRITTEN).all())
