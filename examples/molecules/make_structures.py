"""Make conformers of small molecules and water clusters: test.xyz, valid.xyz and train.xyz.

    python make_structures.py                      # about three minutes on one core
    python make_structures.py --scale 0.05 --kinds water methane --output small

Energies play no part yet: `md-plugin label` computes them. Two sorts of conformers:

    displaced   each atom of the textbook geometry moved by a Gaussian, x += s N(0, 1), with s drawn
                log-uniformly from `AMPLITUDES`; waters of a cluster placed and turned at random
    dynamics    snapshots of Langevin dynamics with the forces of HF/STO-3G, which cost a tenth of
                those of a functional and sample the right molecules, at slightly wrong bond lengths

Each part of the data has its own random stream and its own trajectories (seed, part, kind), so that
no test frame is a neighbour in time of a training frame. Frames are shuffled: the first n of a file
are a fair sample of it. Lengths in Å.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from rich.progress import track

from md_plugin.nanodft import NanoDFTCalculator

Rng = np.random.Generator

KINDS = {
    "water": ("H2O", 1, 80),
    "ammonia": ("NH3", 1, 90),
    "methane": ("CH4", 1, 90),
    "formaldehyde": ("H2CO", 1, 90),
    "ethylene": ("C2H4", 1, 90),
    "methanol": ("CH3OH", 1, 130),
    "water dimer": ("H2O", 2, 150),
    "water trimer": ("H2O", 3, 60),
}
"""Kind -> name of the molecule in ASE, how many of it, frames in all parts together."""

PARTS = {"test": 0.15, "valid": 0.10, "train": 0.75}

DYNAMICS = 0.35
"""Share of the frames that come from dynamics."""

AMPLITUDES = (0.02, 0.12)
"""Å; 0.04 Å is the thermal amplitude of an O-H bond at 1000 K."""

SPACINGS = (2.4, 5.0)
"""Å between the oxygen atoms of neighbouring waters."""

CLOSEST = 1.5
"""Å between atoms of two molecules; nearer ones react."""

TEMPERATURES = {1: 1000.0, 2: 300.0, 3: 300.0}
"""K, by the number of molecules: hot clusters fall apart."""


def turned(atoms: Atoms, rng: Rng) -> Atoms:
    """Return a copy in a random orientation, uniform over rotations."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    q *= np.linalg.det(q)
    return Atoms(atoms.numbers, atoms.positions @ q)


def assembled(name: str, n: int, rng: Rng) -> Atoms:
    """Return `n` molecules, each near an earlier one and turned at random, none too close."""
    atoms = turned(molecule(name), rng)
    size = len(atoms)
    while len(atoms) < n * size:
        direction = rng.normal(size=3)
        direction *= rng.uniform(*SPACINGS) / np.linalg.norm(direction)
        neighbour = size * rng.integers(len(atoms) // size)
        new = turned(molecule(name), rng)
        new.translate(atoms.positions[neighbour] + direction - new.positions[0])
        between = new.positions[:, None] - atoms.positions
        if np.linalg.norm(between, axis=-1).min() > CLOSEST:
            atoms += new
    return atoms


def displaced(name: str, n: int, rng: Rng) -> Atoms:
    """Return `n` molecules with each atom moved at random."""
    atoms = assembled(name, n, rng)
    scale = np.exp(rng.uniform(*np.log(AMPLITUDES)))
    atoms.positions += rng.normal(scale=scale, size=atoms.positions.shape)
    return atoms


def dynamics(name: str, n: int, rng: Rng) -> Iterator[Atoms]:
    """Relax `n` molecules, heat them for 25 fs, then yield a snapshot each 6 fs, without end."""
    atoms = assembled(name, n, rng)
    atoms.calc = NanoDFTCalculator(xc="hf", basis="sto-3g", conv_tol_grad=1e-5)
    with BFGS(atoms, logfile=None) as optimizer:
        optimizer.run(fmax=0.1, steps=40)
    temperature = TEMPERATURES[n]
    # Twice as hot, since half of it becomes potential energy of the vibrations.
    widths = np.sqrt(2 * units.kB * temperature * atoms.get_masses())
    atoms.set_momenta(widths[:, None] * rng.normal(size=atoms.positions.shape))
    # Holding the centre of mass (fixcm) would bias the temperature.
    settings = {"temperature_K": temperature, "friction": 0.02 / units.fs, "fixcm": False}
    run = Langevin(atoms, units.fs, rng=rng, **settings)
    run.run(25)
    while True:
        run.run(6)
        yield Atoms(atoms.numbers, atoms.positions)


def conformers(kind: str, count: int, rng: Rng) -> list[Atoms]:
    """Return `count` conformers of a kind, the snapshots of dynamics last."""
    name, n, _ = KINDS[kind]
    n_snapshots = round(DYNAMICS * count)
    found = [displaced(name, n, rng) for _ in range(count - n_snapshots)]
    found += islice(dynamics(name, n, rng), n_snapshots)
    for k, atoms in enumerate(found):
        sort = "displaced" if k < count - n_snapshots else "dynamics"
        atoms.info |= {"config_type": kind, "sampling": sort}
    return found


def make(part: str, kinds: list[str], seed: int, scale: float) -> list[Atoms]:
    """Return all conformers of a part, shuffled."""
    frames: list[Atoms] = []
    for kind in track(kinds, description=f"{part:5s}"):
        rng = np.random.default_rng([seed, zlib.crc32(f"{part} {kind}".encode())])
        frames += conformers(kind, max(2, round(scale * PARTS[part] * KINDS[kind][2])), rng)
    order = np.random.default_rng([seed, zlib.crc32(part.encode())]).permutation(len(frames))
    return [frames[k] for k in order]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("structures"), help="folder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of frames")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        frames = make(part, options.kinds, options.seed, options.scale)
        write(options.output / f"{part}.xyz", frames, format="extxyz")


if __name__ == "__main__":
    main()
