"""Bad input of nanodft: each case has its own sentence, before any integral is made."""

import subprocess
import sys

import nanodft_cases as cases
import numpy as np
import pytest
import torch

from md_plugin.kernels import BackendError
from md_plugin.nanodft import Settings, UnsupportedSystem, energy_forces, integrals
from md_plugin.nanodft.scf import inverse_root

WATER = cases.displaced("H2O").positions
SETTINGS = {"xc": "hf", "basis": "sto-3g"}


@pytest.fixture
def no_integrals(monkeypatch):
    """Fails the test where anything is computed."""

    def refuse(*args, **kwargs):
        raise AssertionError("an integral was asked for")

    for name in ("overlap", "kinetic", "nuclear", "eri"):
        monkeypatch.setattr(integrals, name, refuse)


def with_row(row, value):
    x = WATER.copy()
    x[row] = value
    return x


LINE = np.arange(60.0)[:, None] * [0.0, 0.0, 1.0]
MOLECULES = {
    "nan": ([8, 1, 1], with_row(1, np.nan), ValueError, r"not finite: atom 1 is at \[nan"),
    "inf": ([8, 1, 1], with_row(2, [0, np.inf, 0]), ValueError, "not finite: atom 2 is at"),
    "close": ([8, 1, 1], with_row(2, WATER[0] + 0.05), ValueError, r"atoms 0 and 2 are 0\.087 Å"),
    "same": ([8, 1, 1], with_row(2, WATER[1]), ValueError, r"atoms 1 and 2 are 0\.000 Å apart"),
    "empty": ([], np.zeros((0, 3)), ValueError, "there are no atoms"),
    "too few": ([8, 1, 1], WATER[:2], ValueError, r"positions have shape \(2, 3\), but 3 atoms"),
    "flat": ([8, 1, 1], WATER.ravel(), ValueError, r"positions have shape \(9,\)"),
    "ghost": ([8, 0, 1], WATER, ValueError, "atom 1 has atomic number 0: dummy and ghost"),
    "fractions": ([8.0, 1.0, 1.0], WATER, ValueError, "numbers must be a list of integers"),
    "table": ([[8, 1, 1]], WATER, ValueError, r"integers, got shape \(1, 3\)"),
    "words": ([8, 1, 1], [["x"] * 3] * 3, ValueError, "positions must be real numbers in Å: "),
    "complex": ([8, 1, 1], WATER + 0j, ValueError, "real numbers in Å: Cannot cast"),
    "graph": ([8, 1, 1], torch.tensor(WATER, requires_grad=True), ValueError, "positions.detach"),
    "odd": ([8, 1], WATER[:2], UnsupportedSystem, r"9 electrons \(charge 0\) are no closed"),
    "heavy": ([35, 1], WATER[:2], UnsupportedSystem, r"\[35\] are out of range; .* H to Ar"),
    "large": ([10] * 60, LINE, UnsupportedSystem, "300 functions of sto-3g are too many"),
}
WRONG = {
    "odd": ({"charge": 1}, UnsupportedSystem, r"9 electrons \(charge 1\) are no closed shell"),
    "none left": ({"charge": 10}, UnsupportedSystem, r"0 electrons \(charge 10\)"),
    "negative": ({"charge": 12}, UnsupportedSystem, r"-2 electrons \(charge 12\)"),
    "charge": ({"charge": 0.5}, ValueError, r"charge must be an integer, got 0\.5"),
    "truth": ({"charge": True}, ValueError, "charge must be an integer, got True"),
    "basis": ({"basis": "sto-9x"}, UnsupportedSystem, "no basis set 'sto-9x' for"),
    "no name": ({"basis": None}, ValueError, "basis must be the name of a basis set, got None"),
    "d shells": ({"basis": "6-31g*"}, UnsupportedSystem, "l = 2 for O; supported are"),
    "contraction": ({"basis": "ano"}, UnsupportedSystem, "; supported are"),
    "xc": ({"xc": "pbe0"}, ValueError, "xc 'pbe0' is not known; choose hf, svwn, b3lyp, b3lyp5"),
    "level": ({"grid_level": 12}, ValueError, "integer from 0 to 9, got 12"),
    "no level": ({"grid_level": 2.0}, ValueError, r"integer from 0 to 9, got 2\.0"),
    "true level": ({"grid_level": True}, ValueError, "integer from 0 to 9, got True"),
    "response": ({"grid_response": "no"}, ValueError, "must be True or False, got 'no'"),
    "apple": ({"device": "mps"}, (BackendError, ValueError), "mps"),
    "device": ({"device": "abacus"}, ValueError, "device 'abacus' is not known"),
    "backend": ({"backend": "abacus"}, BackendError, r"unknown backend 'abacus'\. Available: "),
    "energy": ({"conv_tol": 0}, ValueError, "conv_tol must be a positive number, got 0"),
    "word": ({"conv_tol": "low"}, ValueError, "conv_tol must be a positive number, got 'low'"),
    "gradient": ({"conv_tol_grad": np.nan}, ValueError, "conv_tol_grad must be a positive"),
    "cycles": ({"max_cycle": 0}, ValueError, "max_cycle must be a positive integer, got 0"),
    "memory": ({"max_memory_mb": -1}, ValueError, "max_memory_mb must be a positive number"),
}
STARTS = {
    "shape": (np.eye(3), r"dm0 is \(3, 3\) of torch\.float64, but must be \(7, 7\)"),
    "dtype": (np.eye(7, dtype=np.float32), r"dm0 is \(7, 7\) of torch\.float32, but must be"),
    "word": ("sad", "dm0 must be a matrix: "),
    "one sided": (np.triu(np.ones((7, 7))), "dm0 is not symmetric"),
    "nan": (np.full((7, 7), np.nan), "dm0 is not finite"),
}


@pytest.mark.parametrize("case", MOLECULES)
def test_molecules(case, no_integrals):
    numbers, positions, error, message = MOLECULES[case]
    with pytest.raises(error, match=message):
        energy_forces(numbers, positions, **SETTINGS)


@pytest.mark.parametrize("case", WRONG)
def test_settings(case, no_integrals):
    settings, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        energy_forces([8, 1, 1], WATER, **{**SETTINGS, **settings})


@pytest.mark.parametrize("case", STARTS)
def test_starting_densities(case, no_integrals):
    dm0, message = STARTS[case]
    with pytest.raises(ValueError, match=message):
        energy_forces([8, 1, 1], WATER, dm0=dm0, **SETTINGS)


def test_cuda_where_there_is_none(monkeypatch, no_integrals):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees no CUDA"):
        Settings(device="cuda")


def test_unknown_settings():
    with pytest.raises(TypeError, match="functional"):
        energy_forces([8, 1, 1], WATER, functional="hf")


def test_integrals_beyond_the_bound_are_refused_before_they_are_allocated(monkeypatch):
    atoms = cases.displaced("C6H6")
    largest = []
    original = torch.Tensor.new_zeros

    def new_zeros(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        largest.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    message = "of 66 basis functions need 191 MB, more than max_memory_mb = 100"
    with pytest.raises(MemoryError, match=message):
        energy_forces(atoms.numbers, atoms.positions, xc="hf", max_memory_mb=100)
    assert max(largest, default=0) < 1e6


def test_linearly_dependent_functions(monkeypatch):
    """Six lithium atoms within 0.2 Å: their diffuse functions are nearly the same."""
    monkeypatch.setattr(integrals, "eri", None)  # refused before the long integrals
    near = 0.11 * np.vstack([np.eye(3), -np.eye(3)])
    with pytest.raises(
        UnsupportedSystem, match="linearly dependent, atoms are too close: the smal"
    ):
        energy_forces([3] * 6, near, xc="hf", basis="6-31g")


def test_inverse_root_knows_its_limit():
    vectors = torch.linalg.qr(torch.arange(9, dtype=torch.float64).reshape(3, 3) + torch.eye(3))[0]
    for smallest, good in ((2e-8, True), (5e-9, False), (-1e-9, False)):
        overlap = vectors @ torch.diag(torch.tensor([smallest, 1.0, 1.0])).double() @ vectors.T
        if good:
            x = inverse_root(overlap)
            torch.testing.assert_close(x @ overlap @ x, torch.eye(3).double(), atol=1e-7, rtol=0)
        else:
            with pytest.raises(UnsupportedSystem, match="smallest eigenvalue of the overlap is"):
                inverse_root(overlap)


def test_electrons_that_do_not_fit():
    with pytest.raises(
        UnsupportedSystem, match="2 electron pairs do not fit into 1 basis functions"
    ):
        energy_forces([2], np.zeros((1, 3)), charge=-2, **SETTINGS)


@pytest.mark.parametrize(
    "call",
    [
        "nanodft.energy_forces([1, 1], [[0, 0, 0], [0, 0, 0.7]])",
        "from md_plugin.nanodft.grid import Grid; Grid.build([1, 1], 0)",
    ],
)
def test_without_pyscf_the_extra_is_named(call):
    code = f"import sys; sys.modules['pyscf'] = None; from md_plugin import nanodft; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: nanodft needs PySCF: pip install")
    assert "md-plugin[dft]" in done.stderr


def test_importing_needs_no_pyscf():
    code = (
        "import sys\n"
        "from md_plugin.nanodft import calculator, energy, label\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'pyscf']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
