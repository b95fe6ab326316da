"""Integrals of nanodft: the Boys function against mpmath, everything else against libcint."""

import itertools
import sys

import mpmath
import numpy as np
import pytest
import torch

pytest.importorskip("pyscf", reason="pyscf is not installed")

from ase.build import molecule

from md_plugin.kernels import BackendError
from md_plugin.nanodft import integrals
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.boys import boys
from md_plugin.nanodft.errors import UnsupportedSystem
from md_plugin.nanodft.hermite import TRIPLES, coulomb

# def2-svp of hydrogen has a p shell alone, HCl and H2O have sp shells and bare s shells.
SYSTEMS = [("H2", "sto-3g"), ("H2", "def2-svp"), ("H2O", "sto-3g"), ("HCl", "6-31g")]
SYSTEMS += [("CH4", "6-31g"), ("LiH", "6-31++g")]
BACKENDS = ["torch", "numba", "libcint"]


def system(name, basis, seed=0):
    """Basis and positions (bohr) of a molecule of ASE's collection, displaced."""
    atoms = molecule(name)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(atoms), 3, generator=generator, dtype=torch.float64)
    return Basis.build(atoms.numbers, basis), torch.tensor(atoms.positions) / 0.529177 + 0.1 * noise


def worst(got, want):
    return float((got - torch.as_tensor(want)).abs().max())


# ---- Boys function -------------------------------------------------------------------------------


def test_boys_function_against_mpmath():
    arguments = [0.0, 1e-16, 1e-14, 1e-9, 1e-3, 0.03, 0.5, 1.0, 7.3, 20.0, 44.9, 45.1, 200.0, 1e4]
    values = boys(6, torch.tensor(arguments, dtype=torch.float64))
    mpmath.mp.dps = 40
    for (m, row), (i, t) in itertools.product(enumerate(values), enumerate(arguments)):
        if t:
            a = m + mpmath.mpf(1) / 2
            exact = mpmath.gammainc(a, 0, t) / (2 * mpmath.mpf(t) ** a)
        else:
            exact = mpmath.mpf(1) / (2 * m + 1)
        assert abs(float(row[i]) / exact - 1) < 1e-13, (m, t)


def test_boys_function_is_differentiable():
    t = torch.tensor([0.01, 0.7, 3.0, 30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: boys(4, x), t)


def test_hermite_integrals_are_derivatives():
    """R_tuv of order up to 4 against repeated autograd of F_0 = sqrt(pi / T) / 2 erf(sqrt(T))."""
    alpha = torch.tensor(0.8, dtype=torch.float64)
    distance = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    argument = alpha * (distance * distance).sum()
    first = 0.5 * torch.sqrt(torch.pi / argument) * torch.erf(torch.sqrt(argument))
    for triple, value in zip(TRIPLES, coulomb(4, alpha, distance), strict=False):
        slope = first
        for axis in (d for d in range(3) for _ in range(triple[d])):
            slope = torch.autograd.grad(slope, distance, create_graph=True)[0][axis]
        assert abs(float((value - slope).detach())) < 1e-11, triple


# ---- one electron --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, basis_name", SYSTEMS)
def test_one_electron_integrals_against_libcint(name, basis_name):
    basis, x = system(name, basis_name)
    mole, charges = basis.mole(x), torch.tensor(basis.numbers)
    assert worst(integrals.overlap(basis, x), mole.intor("int1e_ovlp")) < 1e-14
    assert worst(integrals.kinetic(basis, x), mole.intor("int1e_kin")) < 1e-12
    assert worst(integrals.nuclear(basis, x, charges), mole.intor("int1e_nuc")) < 1e-11
    assert worst(integrals.dipole(basis, x), mole.intor("int1e_r")) < 1e-13


@pytest.mark.parametrize("name", ["overlap", "kinetic", "nuclear", "dipole"])
def test_one_electron_derivatives(name):
    basis, x = system("LiH", "sto-3g")
    more = (torch.tensor(basis.numbers),) if name == "nuclear" else ()
    function = getattr(integrals, name)
    # atol: the largest elements are of order ten
    assert torch.autograd.gradcheck(
        lambda y: function(basis, y, *more), x.requires_grad_(), atol=1e-6
    )


# ---- two electrons -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, basis_name", SYSTEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_repulsion_integrals_against_libcint(name, basis_name, backend):
    basis, x = system(name, basis_name)
    values = integrals.eri(basis.numbers, x, basis, backend)
    assert values.shape == (basis.n_ao,) * 4
    assert worst(values, basis.mole(x).intor("int2e")) < 1e-11


def test_repulsion_integrals_far_apart():
    """Arguments of the Boys function beyond its table."""
    basis = Basis.build([1, 3, 9], "sto-3g")
    x = torch.tensor([[0.0, 0, 0], [0, 9, 1], [25, 3, -8]], dtype=torch.float64)
    want = basis.mole(x).intor("int2e")
    for backend in ("torch", "numba"):
        assert worst(integrals.eri(basis.numbers, x, basis, backend), want) < 1e-11


def test_repulsion_integrals_of_benzene_with_two_threads():
    basis, x = system("C6H6", "sto-3g")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = integrals.eri(basis.numbers, x, basis, "numba")
    finally:
        torch.set_num_threads(before)
    assert worst(two, integrals.eri(basis.numbers, x, basis, "libcint")) < 1e-11
    assert torch.equal(two, two.permute(1, 0, 2, 3))
    assert worst(two, two.permute(2, 3, 0, 1)) < 1e-14


def test_blocks_do_not_change_the_integrals():
    basis, x = system("CH4", "6-31g")
    small, large = (
        integrals.eri(basis.numbers, x, basis, "torch", max_memory_mb=mb) for mb in (1.5, 1000)
    )
    assert worst(small, large) < 1e-13


def test_integrals_above_the_memory_bound_are_refused_before_anything(monkeypatch):
    basis, x = system("C6H6", "6-31g")
    monkeypatch.setattr(integrals, "_module", lambda name: pytest.fail("it computed"))
    with pytest.raises(MemoryError, match=r"66 basis functions need 191 MB.*max_memory_mb = 150"):
        integrals.eri(basis.numbers, x, basis, "libcint", max_memory_mb=150)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(3, 3, dtype=torch.float32), "torch.float32"),
        (np.zeros((3, 3)), "positions must be a torch.Tensor, got ndarray"),
        (torch.zeros(2, 3, dtype=torch.float64), r"\(2, 3\).*not \(\.\.\., 3, 3\)"),
        (torch.full((3, 3), torch.nan, dtype=torch.float64), "not finite"),
    ],
)
def test_positions_of_the_wrong_kind(bad, message):
    basis, _ = system("H2O", "sto-3g")
    with pytest.raises(ValueError, match=message):
        integrals.eri(basis.numbers, bad, basis)


def test_names_of_a_basis_and_atoms_of_another():
    basis, x = system("H2O", "sto-3g")
    named = integrals.eri([8, 1, 1], x, "sto-3g", "torch")
    assert torch.equal(named, integrals.eri(torch.tensor([8, 1, 1]), x, basis, "torch"))
    with pytest.raises(ValueError, match=r"of atoms \[8, 1, 1\], not of \[8, 1\]"):
        integrals.eri([8, 1], x, basis)
    with pytest.raises(ValueError, match="atomic numbers must be integers"):
        integrals.eri([8.0, 1.0, 1.0], x, "sto-3g")


def test_devices_that_nanodft_does_not_know():
    with pytest.raises(BackendError, match="nanodft computes on cpu and cuda, not on meta"):
        integrals.get_backend("auto", "meta")


# ---- basis ---------------------------------------------------------------------------------------


def test_a_basis_is_built_once():
    assert Basis.build([8, 1, 1], "sto-3g") is Basis.build(torch.tensor([8, 1, 1]), "sto-3g")


@pytest.mark.parametrize(
    "numbers, name, message",
    [
        ([], "sto-3g", "no atoms"),
        ([0, 1], "sto-3g", r"atomic numbers \[0\] are out of range; supported are H to Ar"),
        ([26], "sto-3g", r"atomic numbers \[26\]"),
        ([6], "cc-pvdz", "general contraction|l = 2 for C"),
        ([6], "6-31g*", "6-31g\\* has shells of l = 2 for C; supported are"),
        ([6], "no-such-set", "no basis set 'no-such-set' for C; supported are"),
        ([6] * 20, "6-31g", "180 functions of 6-31g are too many; .* at most 150 functions"),
    ],
)
@pytest.mark.filterwarnings("ignore:Basis may be available:UserWarning")
def test_what_is_not_supported(numbers, name, message):
    with pytest.raises(UnsupportedSystem, match=message):
        Basis.build(numbers, name)
    assert issubclass(UnsupportedSystem, ValueError)


def test_without_pyscf(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyscf", None)
    with pytest.raises(ImportError, match=r"pip install 'md-plugin\[dft\]'"):
        Basis.build([1, 1, 1, 1], "sto-3g")
