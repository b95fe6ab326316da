"""Two-electron gradients of nanodft: every backend against libcint, finite differences, bounds."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyscf", reason="pyscf is not installed")

import numpy as np
import pyscf.gto
from pyscf.grad.rhf import get_jk
from test_nanodft_integrals import SYSTEMS, system, worst

from md_plugin.kernels import registry
from md_plugin.kernels.registry import BackendError
from md_plugin.nanodft import integrals, two_electron_numba
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.integrals import two_electron_gradient

HAVE_TRITON = integrals.list_backends()["triton"] == ""
BACKENDS = ["torch", "numba", "libcint"]
BACKENDS += [
    pytest.param("triton", marks=pytest.mark.skipif(not HAVE_TRITON, reason="triton is absent"))
]


def random_density(basis, seed=1):
    """Symmetric, not idempotent."""
    generator = torch.Generator().manual_seed(seed)
    dm = torch.randn(basis.n_ao, basis.n_ao, generator=generator, dtype=torch.float64)
    return dm + dm.T


def gradient(basis, x, dm, hyb, backend, **options):
    options = {"backend": backend, **options}
    return two_electron_gradient(basis.numbers, x, dm, basis=basis, hyb=hyb, **options)


def energy(basis, x, dm, hyb, backend):
    values = integrals.eri(basis.numbers, x, basis, backend)
    coulomb = torch.einsum("ijkl,ij,kl", values, dm, dm)
    return coulomb / 2 - hyb / 4 * torch.einsum("ijkl,ik,jl", values, dm, dm)


# ---- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyb", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name, basis_name", SYSTEMS)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_against_libcint(backend, name, basis_name, hyb):
    basis, x = system(name, basis_name)
    dm = random_density(basis)
    want = gradient(basis, x, dm, hyb, "libcint")
    # torch leaves nothing out; numba's screening is `two_electron_numba.GRADIENT_CUT`
    tolerance = {"torch": 1e-11, "numba": 1e-9}[backend]
    assert worst(gradient(basis, x, dm, hyb, backend), want) < tolerance * float(want.abs().max())


@pytest.mark.parametrize("basis_name", ["sto-3g", "6-31g"])
def test_benzene_against_pyscf_and_faster(basis_name):
    basis, x = system("C6H6", basis_name)
    dm, mole = random_density(basis), basis.mole(x)
    matrix = dm.numpy()
    gradient(basis, x, dm, 0.2, "numba")  # compiled, or loaded
    clock = [time.process_time()]
    got = gradient(basis, x, dm, 0.2, "numba")
    clock.append(time.process_time())
    coulomb, exchange = get_jk(mole, matrix)
    clock.append(time.process_time())
    slopes = ((coulomb - 0.1 * exchange) * matrix).sum(2)  # of each function
    rows = mole.aoslice_by_atom()[:, 2:]
    want = np.array([2 * slopes[:, i:j].sum(1) for i, j in rows.tolist()])
    assert worst(got, want) < 1e-8 * np.abs(want).max()
    # Measured: 0.09 of get_jk's time, in CPU seconds with one thread.
    assert clock[1] - clock[0] < clock[2] - clock[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences_of_the_own_energy(backend):
    basis, x = system("LiH", "sto-3g")
    dm, step = random_density(basis), 1e-3
    of_energy = "torch" if backend == "triton" else backend  # interpreted integrals take seconds
    got = gradient(basis, x, dm, 0.2, backend)
    for atom, axis in ((0, 0), (1, 2)):
        slope = 0.0
        for factor, shift in ((8, 1), (-8, -1), (-1, 2), (1, -2)):  # over 12 h, error h^4
            moved = x.clone()
            moved[atom, axis] += shift * step
            slope += factor * float(energy(basis, moved, dm, 0.2, of_energy)) / (12 * step)
        assert abs(float(got[atom, axis]) - slope) < 1e-8


@pytest.mark.parametrize("backend", ["torch", "numba", "libcint"])
def test_atoms_far_apart(backend):
    """Arguments of the Boys function beyond its table, and a molecule that feels no other."""
    basis, x = Basis.build([1, 3, 1, 3], "sto-3g"), torch.zeros(4, 3, dtype=torch.float64)
    x[1, 2], x[2:, 0] = 3.0, 40.0
    x[3, 1] = 2.5
    dm = random_density(basis)
    got = gradient(basis, x, dm, 0.2, backend)
    assert worst(got, gradient(basis, x, dm, 0.2, "libcint")) < 1e-9
    assert float(got.sum(0).abs().max()) < 1e-9


def test_threads_and_repetition():
    basis, x = system("CH4", "6-31g")
    dm, before = random_density(basis), torch.get_num_threads()
    want = gradient(basis, x, dm, 0.2, "numba")
    torch.set_num_threads(2)
    try:
        assert torch.equal(gradient(basis, x, dm, 0.2, "numba"), want)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["torch", "libcint"])
def test_blocks_do_not_change_the_gradient(backend):
    basis, x = system("CH4", "6-31g")
    dm = random_density(basis)
    small, large = (gradient(basis, x, dm, 0.2, backend, max_memory_mb=mb) for mb in (0.05, 1000))
    assert worst(small, large) < 1e-11


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "libcint"])
def test_no_integral_of_libcint_is_called(backend, monkeypatch):
    basis, x = system("H2", "def2-svp")
    dm = random_density(basis)

    def refuse(*_, **__):
        pytest.fail("libcint was called")

    monkeypatch.setattr(pyscf.gto.Mole, "intor", refuse)
    for function in (integrals.overlap, integrals.kinetic, integrals.dipole):
        function(basis, x)
    integrals.nuclear(basis, x, torch.tensor(basis.numbers))
    integrals.eri(basis.numbers, x, basis, backend)
    gradient(basis, x, dm, 0.2, backend)


# ---- bounded -------------------------------------------------------------------------------------

MEMORY = """
import json, re, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_nanodft_gradient import gradient, random_density, system

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

backend, basis_name, bound = sys.argv[2], sys.argv[3], float(sys.argv[4])
for name in ("H2O", "C6H6"):  # the first run loads and compiles
    basis, x = system(name, basis_name)
    dm = random_density(basis)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = kilobytes("VmRSS")
    gradient(basis, x, dm, 0.2, backend, max_memory_mb=bound)
print(json.dumps((kilobytes("VmHWM") - before) / 1e3))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks")
@pytest.mark.parametrize(
    "backend, basis_name, bound, limit",
    [("numba", "6-31g", 32, 64), ("libcint", "6-31g", 32, 64), ("torch", "sto-3g", 64, 128)],
)
def test_memory_of_benzene(backend, basis_name, bound, limit):
    """The array (3, N, N, N, N) that is never stored takes 434 MB in 6-31G, 40 MB in STO-3G."""
    arguments = [str(Path(__file__).parent), backend, basis_name, str(bound)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) < limit


# ---- refused -------------------------------------------------------------------------------------


def test_unknown_and_absent_backends(monkeypatch):
    with pytest.raises(BackendError, match=r"unknown backend 'cuda9'. Available: torch, numba"):
        integrals.get_backend("cuda9")
    with pytest.raises(BackendError, match="'numba' computes on cpu, not on cuda"):
        integrals.get_backend("numba", "cuda")
    integrals._absence.cache_clear()
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "numba" else True)
    with pytest.raises(BackendError, match=r"'numba' is not available: .*pip install numba"):
        integrals.get_backend("numba")
    integrals._auto.cache_clear()
    assert integrals.get_backend("auto") == "torch"
    integrals._absence.cache_clear()
    integrals._auto.cache_clear()


def test_auto_is_numba_on_the_cpu():
    assert integrals.get_backend("auto", "cpu") == "numba"


def test_a_wrong_kernel_is_an_error_and_not_a_result(monkeypatch):
    basis, x = system("H2", "sto-3g")
    right = two_electron_numba._potential
    monkeypatch.setattr(two_electron_numba, "_potential", lambda *given: 1.001 * right(*given))
    integrals._self_check.cache_clear()
    with pytest.raises(BackendError, match="'numba' computes a wrong two_electron_gradient on cpu"):
        gradient(basis, x, random_density(basis), 0.2, "numba")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda dm: dm[:-1], r"the density matrix is \(6, 7\).*not \(7, 7\)"),
        (lambda dm: dm.float(), "torch.float32"),
        (lambda dm: dm.tril(), "not symmetric"),
    ],
)
def test_density_matrices_of_the_wrong_kind(change, message):
    basis, x = system("H2O", "sto-3g")
    with pytest.raises(ValueError, match=message):
        gradient(basis, x, change(random_density(basis)), 0.2, "torch")


def test_a_negative_fraction_of_exchange():
    basis, x = system("H2", "sto-3g")
    with pytest.raises(ValueError, match=r"hyb = -0.2"):
        gradient(basis, x, random_density(basis), -0.2, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_electrons_no_gradient(backend):
    basis, x = system("H2", "sto-3g")
    assert not gradient(basis, x, torch.zeros(2, 2, dtype=torch.float64), 0.2, backend).any()


def test_the_basis_may_be_a_name():
    basis, x = system("H2", "sto-3g")
    dm = random_density(basis)
    named = two_electron_gradient([1, 1], x, dm, basis="sto-3g", hyb=0.2)
    assert torch.equal(named, gradient(basis, x, dm, 0.2, "auto"))
