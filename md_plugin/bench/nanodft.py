"""The case `nanodft` of the bench: density functional theory beside PySCF, on the same threads.

    gradient    of the two-electron energy at a random symmetric density, half exact exchange:
                PySCF's `grad.rhf.get_jk`, and the backends of `md_plugin.nanodft`
    b3lyp       energy and forces of a molecule from nothing, grid level 3 with response, to
                1e-10 Ha: PySCF's RKS and its gradient, and `energy_forces`

Ratios are over PySCF; errors are those of gradients, relative to the largest element of PySCF's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.units import Bohr, Hartree

from md_plugin.bench.core import OTHER, OURS, Contest, Options, Provider
from md_plugin.nanodft import energy_forces, two_electron_gradient
from md_plugin.nanodft.basis import Basis

PYSCF = "PySCF"
HYB = 0.5
# Of two-electron gradients screening leaves out 1e-11 of each integral; those of whole molecules
# carry what is left of both orbital gradients, 1e-7 Ha.
TOLERANCES = {"gradient": 1e-7, "b3lyp": 1e-5}
Gradient = np.ndarray


def nanodft(options: Options) -> Iterator[Contest]:
    """Density functional theory beside PySCF: two-electron gradients, and a molecule in whole."""
    molecules = ("H2O",) if options.quick else ("H2O", "CH4", "C6H6")
    absent = "" if find_spec("pyscf") else "not installed: pip install 'md-plugin[dft]'"
    for name in molecules:
        atoms = molecule(name)
        generator = np.random.default_rng(options.seed)
        atoms.positions += generator.normal(scale=0.05, size=atoms.positions.shape)
        for basis in ("sto-3g", "6-31g"):
            yield _contest(f"gradient, {name} {basis}", atoms, basis, absent, options, _gradients)
        basis = "sto-3g" if name == "C6H6" else "6-31g"  # else a minute for each round
        yield _contest(f"b3lyp, {name} {basis}", atoms, basis, absent, options, _wholes)


def _contest(
    what: str, atoms: Atoms, basis: str, absent: str, options: Options, make: Any
) -> Contest:
    """Ours against PySCF; where that is absent, the one row says so."""
    if absent:
        return Contest(what, (Provider(PYSCF, OTHER, absent=absent),))
    calls: dict[str, Callable[[], Gradient]] = make(atoms, basis, options)
    expected = calls[PYSCF]()
    scale = float(np.abs(expected).max())

    def error(call: Callable[[], Gradient]) -> float:
        return float(np.abs(call() - expected).max()) / scale

    providers = [
        Provider(
            name,
            OTHER if name == PYSCF else OURS,
            call=call,
            error=(lambda call=call: error(call)) if name != PYSCF else None,  # type: ignore[misc]
            tolerance=TOLERANCES[what.split(",")[0]],
        )
        for name, call in calls.items()
    ]
    return Contest(what, tuple(providers), PYSCF, len(atoms), notes={"basis": basis})


def _gradients(atoms: Atoms, basis: str, options: Options) -> dict[str, Callable[[], Gradient]]:
    """dE_2/dR, Ha/bohr, by each backend and by PySCF."""
    from pyscf.grad import rhf

    mole = _mole(atoms, basis, options.threads)
    functions = Basis.build(atoms.numbers, basis)
    x = torch.from_numpy(atoms.positions / Bohr)
    dm = np.random.default_rng(options.seed).normal(size=(functions.n_ao,) * 2)
    dm = dm + dm.T

    def pyscf() -> Gradient:
        j, k = rhf.get_jk(mole, dm)
        slope = np.einsum("xij,ij->xi", j - 0.5 * HYB * k, dm)
        slices = [slice(p, q) for *_, p, q in mole.aoslice_by_atom()]
        found: Gradient = np.stack([2 * slope[:, own].sum(axis=1) for own in slices])
        return found

    def ours(backend: str) -> Callable[[], Gradient]:
        settings: dict[str, Any] = {"basis": functions, "hyb": HYB, "backend": backend}
        density = torch.from_numpy(dm)

        def call() -> Gradient:
            found: Gradient = two_electron_gradient(atoms.numbers, x, density, **settings).numpy()
            return found

        return call

    calls = {f"ours, {backend}": ours(backend) for backend in ("numba", "libcint")}
    if functions.n_ao < 20:
        calls["ours, torch"] = ours("torch")
    return {**calls, PYSCF: pyscf}


def _wholes(atoms: Atoms, basis: str, options: Options) -> dict[str, Callable[[], Gradient]]:
    """Gradients of B3LYP, Ha/bohr, from nothing."""
    from pyscf import dft

    def pyscf() -> Gradient:
        field = dft.RKS(_mole(atoms, basis, options.threads), xc="b3lyp")
        field.conv_tol, field.conv_tol_grad = 1e-10, 1e-7
        field.kernel()
        method = field.nuc_grad_method()
        method.grid_response = True
        found: Gradient = method.kernel()
        return found

    def ours() -> Gradient:
        result = energy_forces(atoms.numbers, atoms.positions, xc="b3lyp", basis=basis)
        found: Gradient = result.forces * (-Bohr / Hartree)
        return found

    return {"ours": ours, PYSCF: pyscf}


def _mole(atoms: Atoms, basis: str, threads: int) -> Any:
    """The same molecule for PySCF, in bohr, because ASE's bohr is not PySCF's."""
    from pyscf import gto, lib

    lib.num_threads(threads)
    pairs = list(zip(atoms.numbers.tolist(), (atoms.positions / Bohr).tolist(), strict=True))
    return gto.M(atom=pairs, unit="bohr", basis=basis, verbose=0)
