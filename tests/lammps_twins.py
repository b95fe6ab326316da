"""The same LAMMPS script with pair_style lj/cut and with its twin under pair_style mliap/py."""

from dataclasses import dataclass

import numpy as np
from lammps_helpers import dump_object, tables, write_crystal
from lammps_objects import Mixture

FRAME = """
units metal
{head}
newton {newton}
{box}
mass * 39.95
{pair}
velocity all create 150.0 4242 loop geom
compute ea all pe/atom
compute sa all stress/atom NULL
compute se all reduce sum c_ea
compute ss all reduce sum c_sa[1] c_sa[2] c_sa[3] c_sa[4] c_sa[5] c_sa[6]
compute pp all pressure NULL pair
thermo_style custom step atoms pe pxx pyy pzz pxy pxz pyz c_pp c_pp[*] c_se c_ss[*] vol ke
thermo_modify format float %.16g
thermo 3
timestep 0.004
neighbor 1.0 bin
fix nve all nve
{body}
write_dump all custom dump.{tag} id type x y z fx fy fz c_ea c_sa[*] &
    modify sort id format float %.16g
"""

AGAIN = FRAME[FRAME.index("compute ea") : FRAME.index("{body}")]


RCUT = 7.0


def lj(style=f"lj/cut {RCUT}", sub="", pairs=("1 1", "1 2", "2 2")):
    """pair_style lj/cut and the numbers of `Mixture`."""
    numbers = {"1 1": "0.0103 3.405", "1 2": "0.0118 3.52", "2 2": "0.014 3.65"}
    return f"pair_style {style}\n" + "\n".join(f"pair_coeff {p} {sub} {numbers[p]}" for p in pairs)


def py(style="mliap unified model.pkl 0", coeff="* * Ar Kr"):
    return f"pair_style {style}\npair_coeff {coeff}"


@dataclass(frozen=True)
class Feature:
    """A script with holes; pairs are the two ways to say the same potential."""

    body: str = "run 9"
    head: str = ""
    newton: str = "on"
    box: str = "read_data atoms.data"
    pairs: tuple = (lj(), py())
    tilt: tuple = (0.0, 0.0, 0.0)
    height: float | None = None
    constant: float = 5.3
    style: str = "atomic"
    # 9 steps with rebuilds: rounding of 1e-16 grows, and pressure is a small difference
    tolerance: float = 1e-11


COLUMNS = {"charge": "{} {} 0.1", "molecular": "{} 1 {}", "full": "{} 1 {} -0.2"}


def fill(text, feature, tag):
    """The script with one of the two potentials."""
    twin = tag == "py"
    words = {
        "{body}": feature.body,
        "{head}": f"atom_style {feature.style}\n{feature.head}",
        "{again}": AGAIN,
        "{newton}": feature.newton,
        "{box}": feature.box,
        "{pair}": feature.pairs[twin],
        "{name}": "mliap" if twin else "lj/cut",
        "{tag}": tag,
    }
    for hole, word in words.items():
        text = text.replace(hole, word)
    return text


def write_inputs(folder, feature):
    write_crystal(
        folder / "atoms.data", (3, 3, 3), feature.constant, feature.tilt, feature.height, seed=3
    )
    if feature.style in COLUMNS:
        lines = (folder / "atoms.data").read_text().splitlines()
        start = lines.index("Atoms") + 2
        for k in range(start, len(lines)):
            number, kind, *x = lines[k].split()
            lines[k] = " ".join([COLUMNS[feature.style].format(number, kind), *x])
        (folder / "atoms.data").write_text("\n".join(lines) + "\n")
    dump_object(folder, Mixture(["Ar", "Kr"], RCUT))
    dump_object(folder, Mixture(["Ne", "Kr"], RCUT), "kr.pkl")
    dump_object(folder, Mixture(["Ar", "Kr"], RCUT, update="update_pair_forces_gpu"), "gpu.pkl")
    halves = [fill(FRAME, feature, tag) for tag in ("lj", "py")]
    (folder / "in.lmp").write_text("clear\n".join(halves))


def assert_twins(folder, output, tolerance):
    """Both halves of the output and both dumps agree."""
    found = tables(output)
    assert len(found) % 2 == 0 and found, output
    half = len(found) // 2
    for expected, twin in zip(found[:half], found[half:], strict=True):
        assert_columns(twin, expected, tolerance)
    dumps = [np.loadtxt(folder / f"dump.{tag}", skiprows=9, ndmin=2) for tag in ("lj", "py")]
    assert_columns(dumps[1], dumps[0], tolerance)
    return found[half:], dumps[1]


def assert_columns(found, expected, tolerance):
    """Column by column, relative to the largest entry of the column and of its neighbours.

    Vectors and tensors share a scale, as single components may vanish by symmetry.
    """
    assert found.shape == expected.shape
    scale = np.abs(expected).max(axis=0)
    near = [scale[max(0, k - 2) : k + 3].max() * 1e-3 for k in range(len(scale))]
    scale = np.maximum(np.maximum(scale, near), 1e-12)
    worst = np.abs(found - expected).max(axis=0) / scale
    assert worst.max() < tolerance, (
        f"relative difference {worst.max():.2e}, column {worst.argmax()}"
    )
