"""Writes the reference files for LAMMPS's test_pair_style: `python tests/lammps_yaml/make.py`.

Every number comes from `Potential.evaluate`, ZBL as written in LAMMPS's manual (Ziegler, Biersack,
Littmark 1985), and velocity Verlet, all in Python; LAMMPS has no part in them but the positions and
velocities of its own input deck `data.manybody`: 64 atoms of a perturbed diamond lattice, 8 types.
The models are seeded and written beside the YAML files, whose names follow LAMMPS's.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from model_helpers import make_model  # noqa: E402

from md_plugin.checkpoint import load_model, save_model  # noqa: E402
from md_plugin.neighbours import Batch, Structure  # noqa: E402
from md_plugin.potential import Potential  # noqa: E402

EPSILON = 1e-10  # of each component, small ones too; float64 sums of some hundred terms
DT, MASS, STEPS = 1e-4, 28.06, 4  # in.manybody, data.manybody, test_pair_style.cpp
FTM2V = 1.0 / 1.0364269e-4  # LAMMPS's constants for units metal
QQR2E = 14.399645
MODELS = {"one_layer": 1, "two_layers": 2}
SETTINGS = {"species": (6, 14), "rcut": 4.5, "r_min": 1.6, "r_max": 4.0, "n_nu": 6}
SETTINGS |= {"reference_energies": (-1.25, -0.75), "order": 1, "seed": 11}


@dataclass(frozen=True)
class Case:
    """One YAML file.

    Attributes:
        name: end of the file's name.
        model: of MODELS.
        elements: of the 8 types, None for NULL.
        pair_style: LAMMPS's words.
        pair_coeff: LAMMPS's lines.
        post_commands: LAMMPS's lines.
        zbl: inner and outer cutoff, and the types of whose pairs at least one must be; or None.
    """

    name: str
    model: str
    elements: tuple
    pair_style: str
    pair_coeff: tuple
    post_commands: tuple = ()
    zbl: tuple | None = None


EIGHT = ("Si", "Si", "Si", "Si", "C", "C", "C", "C")
SEVEN = (*EIGHT[:7], None)
NULL = "Si Si Si Si C C C NULL"
GHOSTS = ("comm_modify cutoff 12.0",)  # two layers of 4.5 Å, the skin of 2 Å, and some more
CASES = (
    Case("one", "one_layer", EIGHT, "mliap unified one_layer.pt 0", (f"* * {' '.join(EIGHT)}",)),
    Case(
        *("two", "two_layers", EIGHT, "mliap unified two_layers.pt 1"),
        *((f"* * {' '.join(EIGHT)}",), GHOSTS),
    ),
    Case(
        *("null", "one_layer", SEVEN, "hybrid mliap unified one_layer.pt 0 zbl 3.0 4.0"),
        *((f"* * mliap {NULL}", "1*8 8 zbl 14 14"), (), (3.0, 4.0, (8,))),
    ),
    Case(
        *("null_two", "two_layers", SEVEN, "hybrid mliap unified two_layers.pt 1 zbl 3.0 4.0"),
        *((f"* * mliap {NULL}", "1*8 8 zbl 14 14"), GHOSTS, (3.0, 4.0, (8,))),
    ),
    Case(
        *("zbl", "one_layer", EIGHT, "hybrid/overlay zbl 4.0 4.8 mliap unified one_layer.pt 0"),
        *(("1*8 1*8 zbl 14 14", f"* * mliap {' '.join(EIGHT)}"), (), (4.0, 4.8, range(1, 9))),
    ),
)


def model_path(name):
    """The committed model."""
    return HERE / f"{name}.hipnn"


@cache
def potential(name):
    """A committed model in float64."""
    return load_model(model_path(name), device="cpu", dtype="float64")


def read_data(path):
    """Box length, and types, positions and velocities by atom id, of LAMMPS's data.manybody."""
    text = Path(path).read_text()
    box = float(re.search(r"\S+ (\S+) xlo xhi", text)[1])
    found = re.search(r"\nAtoms.*?\n\n(.*?)\n\nVelocities\s*\n\n(.*?)\n*$", text, re.DOTALL)
    atoms, velocities = (np.loadtxt(part.splitlines()) for part in found.groups())
    atoms, velocities = atoms[atoms[:, 0].argsort()], velocities[velocities[:, 0].argsort()]
    return box, atoms[:, 1].astype(int), atoms[:, 2:5], velocities[:, 1:4]


def zbl_energy(r, inner, outer, z=14.0):
    """ZBL between like atoms, switched to zero from inner to outer as pair_style zbl does, eV."""

    def bare(r):
        scale = 2 * z**0.23 / 0.46850
        terms = ((0.02817, 0.20162), (0.28022, 0.40290), (0.50986, 0.94229), (0.18175, 3.19980))
        return QQR2E * z * z / r * sum(c * torch.exp(-d * scale * r) for c, d in terms)

    end = torch.tensor(outer, dtype=torch.float64, requires_grad=True)
    value = bare(end)
    (slope,) = torch.autograd.grad(value, end, create_graph=True)
    (curve,) = torch.autograd.grad(slope, end)
    value, slope, width = value.detach(), slope.detach(), outer - inner
    a = (-3 * slope + width * curve) / width**2
    b = (2 * slope - width * curve) / width**3
    c = -value + width / 2 * slope - width**2 / 12 * curve
    t = (r - inner).clamp(min=0)
    return torch.where(r < outer, bare(r) + t**3 * (a / 3 + b / 4 * t) + c, 0.0)


def evaluate(case, box, types, x):
    """Energy, virial (3, 3) and forces of a case, all in eV and Å."""
    cell, pbc = box * np.eye(3), np.ones(3, bool)
    numbers = np.array([{"Si": 14, "C": 6, None: 0}[case.elements[t - 1]] for t in types])
    known = numbers > 0
    found = potential(case.model).evaluate(Structure(numbers[known], x[known], cell, pbc))
    energy, virial = float(found.energy[0]), found.virial[0].numpy()
    forces = np.zeros_like(x)
    forces[known] = found.forces.numpy()
    if case.zbl:
        inner, outer, chosen = case.zbl
        everything = Structure(np.full(len(x), 14), x, cell, pbc)
        batch = Batch.from_structures([everything], outer)
        receiver, sender = batch.pairs.receiver.long(), batch.pairs.sender_long
        chosen = torch.as_tensor(np.isin(types, list(chosen)))
        r_ij = batch.r_ij[chosen[receiver] | chosen[sender]].requires_grad_()
        pairs = [i[chosen[receiver] | chosen[sender]] for i in (receiver, sender)]
        total = 0.5 * zbl_energy(r_ij.norm(dim=1), inner, outer).sum()  # each pair is there twice
        (g,) = torch.autograd.grad(total, r_ij)
        energy += float(total.detach())
        virial = virial - (r_ij.detach().T @ g).numpy()
        pushed = torch.zeros(len(x), 3, dtype=torch.float64)
        forces += pushed.index_add(0, pairs[0], g).index_add(0, pairs[1], -g).numpy()
    return energy, virial, forces


def reference(case, data):
    """Energy, virial and forces at the start and after STEPS steps of velocity Verlet."""
    box, types, x, v = read_data(data)
    start = evaluate(case, box, types, x)
    state = start
    for _ in range(STEPS):
        v = v + 0.5 * DT * FTM2V / MASS * state[2]
        x = x + DT * v
        state = evaluate(case, box, types, x)
        v = v + 0.5 * DT * FTM2V / MASS * state[2]
    return {"init": start, "run": state}


def yaml_text(case, found):
    """The file that test_pair_style reads."""
    lines = [
        *("---", "lammps_version: 4 Jul 2026", "tags:", "date_generated: by make.py"),
        *(f"epsilon: {EPSILON:g}", "skip_tests:", "prerequisites: ! |", "  pair mliap"),
        *(["  pair zbl"] if case.zbl else []),
        *("pre_commands: ! |", "  variable newton_pair delete", "  variable newton_pair index on"),
        *_block("post_commands", case.post_commands),
        *("input_file: in.manybody", f"pair_style: {case.pair_style}"),
        *_block("pair_coeff", case.pair_coeff),
        *('extract: ! ""', "natoms: 64"),
    ]
    for when, (energy, virial, forces) in found.items():
        six = [virial[k] for k in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
        lines += [f"{when}_vdwl: {energy:.16g}", f"{when}_coul: 0", f"{when}_stress: ! |2-"]
        lines += ["  " + " ".join(f"{w:23.16e}" for w in six), f"{when}_forces: ! |2"]
        for k, force in enumerate(forces, 1):
            lines.append(f"  {k:3d} " + " ".join(f"{f:23.16e}" for f in force))
    return "\n".join([*lines, "...", ""])


def _block(name, rows):
    return [f"{name}: ! |", *(f"  {row}" for row in rows)] if rows else [f'{name}: ! ""']


def yaml_path(case):
    """The committed file of a case."""
    return HERE / f"manybody-pair-mliap_hipnn_{case.name}.yaml"


def main():
    """Write models and YAML files."""
    from lammps_interface.lammps_build import find_built

    built = find_built()
    if built is None:
        raise SystemExit("needs LAMMPS's data.manybody: run md-plugin lammps build")
    torch.set_num_threads(1)
    for name, layers in MODELS.items():
        model = make_model(n_interactions=layers, **SETTINGS)
        save_model(model_path(name), Potential(model, device="cpu", dtype="float64"))
    for case in CASES:
        found = reference(case, built.inputs / "data.manybody")
        yaml_path(case).write_text(yaml_text(case, found))


if __name__ == "__main__":
    main()
