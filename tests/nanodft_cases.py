"""Molecules for the tests of nanodft, off their equilibrium, and PySCF's answers for them."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.units import Bohr

pytest.importorskip("pyscf", reason="nanodft needs PySCF: pip install 'md-plugin[dft]'")

from pyscf import dft, gto, scf

NAMES = ("H2O", "CH4", "NH3", "C6H6", "HCN", "HCl")
# b3lyp5 and svwn of this project in PySCF's words
PYSCF_XC = {"svwn": "lda,vwn", "b3lyp": "b3lyp", "b3lyp5": "b3lyp5"}


def displaced(name: str, seed: int = 0, sigma: float = 0.05) -> Atoms:
    """A molecule of ASE's collection with atoms moved at random, Å."""
    atoms = molecule(name)
    generator = np.random.default_rng(seed)
    atoms.positions += generator.normal(scale=sigma, size=atoms.positions.shape)
    return atoms


def mole(atoms: Atoms, basis: str = "6-31g", charge: int = 0):
    """The same molecule for PySCF; bohr, because ASE's bohr is not PySCF's."""
    pairs = list(zip(atoms.numbers.tolist(), (atoms.positions / Bohr).tolist(), strict=True))
    return gto.M(atom=pairs, unit="bohr", basis=basis, charge=charge, verbose=0)


def mean_field(atoms: Atoms, xc: str, basis: str, level: int = 0, charge: int = 0):
    """PySCF's converged mean field on the same grid."""
    system = mole(atoms, basis, charge)
    field = scf.RHF(system) if xc == "hf" else dft.RKS(system, xc=PYSCF_XC[xc])
    if xc != "hf":
        field.grids.level = level
    field.conv_tol, field.conv_tol_grad = 1e-12, 1e-9
    field.kernel()
    assert field.converged
    return field


def gradient(field, grid_response: bool = True) -> np.ndarray:
    """(n_atom, 3) dE/dR by PySCF, Ha/bohr."""
    method = field.nuc_grad_method()
    if hasattr(method, "grid_response"):
        method.grid_response = grid_response
    return method.kernel()
