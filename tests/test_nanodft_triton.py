"""The Triton kernels of nanodft: right under the interpreter, and they compile for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyscf", reason="pyscf is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from test_nanodft_gradient import HAVE_TRITON, gradient, random_density
from test_nanodft_integrals import system, worst

from md_plugin.nanodft import energy_forces_batch, eri, two_electron_torch
from md_plugin.nanodft.basis import Basis

if HAVE_TRITON:
    from md_plugin.nanodft import triton_eri, triton_gradient

interpreted = pytest.mark.skipif(not HAVE_TRITON, reason="no GPU, and TRITON_INTERPRET is not set")


@interpreted
@pytest.mark.parametrize("name", ["H2", "H2O"])
def test_integrals_against_torch_and_libcint(name):
    basis, x = system(name, "sto-3g")
    got = eri(basis.numbers, x, "sto-3g", "triton")
    assert worst(got, eri(basis.numbers, x, "sto-3g", "torch")) < 1e-11
    assert worst(got, basis.mole(x).intor("int2e")) < 1e-11


@interpreted
def test_integrals_far_apart_and_several_tiles():
    """Arguments beyond the table of the Boys function; more pairs of shells than a tile has."""
    basis, x = Basis.build([1] * 6, "6-31g"), torch.zeros(6, 3, dtype=torch.float64)
    x[:, 0], x[:, 1] = 1.5 * torch.arange(6), torch.tensor([0.0, 0.3, 9.0, 0.1, 2.0, 7.0])
    assert worst(eri(basis.numbers, x, basis, "triton"), basis.mole(x).intor("int2e")) < 1e-11


@interpreted
def test_many_geometries_are_one_launch_and_the_same_numbers(monkeypatch):
    basis, one = system("H2", "def2-svp")
    x = torch.stack([one, system("H2", "def2-svp", seed=5)[1]])
    dm = torch.stack([random_density(basis, seed) for seed in (1, 2)])
    want = [gradient(basis, x[k], dm[k], 0.2, "torch") for k in range(2)]
    molecules = []
    for module, kernel in ((triton_eri, "_repulsion"), (triton_gradient, "_potential")):
        monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), molecules))
    assert worst(eri([1, 1], x, basis, "triton"), eri([1, 1], x, basis, "torch")) < 1e-11
    assert worst(gradient(basis, x, dm, 0.2, "triton"), torch.stack(want)) < 1e-9
    assert molecules == [2] * (6 + 9)  # unordered pairs of three classes, and ordered ones


@interpreted
def test_energies_and_forces_without_an_integral_of_torch(monkeypatch):
    conformers = [[[0.0, 0.0, 0.0], [0.1, 0.2, z]] for z in (0.7, 0.8)]
    settings = {"xc": "svwn", "basis": "sto-3g", "grid_level": 0}
    want = energy_forces_batch([1, 1], conformers, backend="torch", **settings)
    eri([1, 1], torch.eye(2, 3, dtype=torch.float64), "sto-3g", "triton")  # compares with torch
    for name in ("eri", "two_electron_gradient"):
        monkeypatch.setattr(two_electron_torch, name, None)
    got = energy_forces_batch([1, 1], conformers, backend="triton", **settings)
    for found, expected in zip(got, want, strict=True):
        assert found.backend == "triton" and found.energy == pytest.approx(
            expected.energy, rel=1e-12
        )
        assert abs(found.forces - expected.forces).max() < 1e-8


class Launches:
    """A kernel that notes for how many molecules it is launched."""

    def __init__(self, kernel, molecules):
        self.kernel, self.molecules = kernel, molecules

    def __getitem__(self, grid):
        self.molecules.append(grid[2])
        return self.kernel[grid]


@interpreted
@pytest.mark.parametrize("name, hyb", [("H2", 0.0), ("H2", 1.0), ("H2O", 0.0), ("H2O", 0.2)])
def test_triton_against_torch(name, hyb):
    basis, x = system(name, "sto-3g")
    dm = random_density(basis)
    want = gradient(basis, x, dm, hyb, "torch")
    assert worst(gradient(basis, x, dm, hyb, "triton"), want) < 1e-9


COMPILE = """
import json, re
from triton_assembly import assembly, findings
from md_plugin.nanodft import triton_eri, triton_gradient
from md_plugin.nanodft.triton_parts import OPTIONS

eri, gradient = triton_eri.compiled_in, triton_gradient.compiled_in
kernels = {
    "gradient (sp s|sp s)": (triton_gradient._potential, gradient(2, 1, True), 168, 0),
    "eri (sp s|sp s)": (triton_eri._repulsion, eri(1, 1), 200, 64),
    "eri (sp sp|sp sp)": (triton_eri._repulsion, eri(2, 2), 255, 192),
}
sizes = {"n_bra": 41, "n_ket": 57, "n_dm": 7, "n_bra_pair": 9, "n_ket_pair": 11, "n_out": 28}
for name, (kernel, constants, registers, stack) in kernels.items():
    for capability in (80, 90):
        used = {n: size for n, size in sizes.items() if n in kernel.arg_names}
        asm = assembly(kernel, "fp64", capability, constants, used, OPTIONS)
        row = {"kernel": f"{name} sm_{capability}", "registers": registers, "stack": stack}
        row |= findings(asm)
        row["single"] = re.findall(r"[a-z.]+\\.f32", asm["ptx"])
        row["atomic"] = ".red." in asm["ptx"] or "atom." in asm["ptx"]
        print(json.dumps(row))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheel has ptxas on Linux only")
def test_the_kernels_compile_for_a100_and_h100(tmp_path):
    """The gradient's (sp sp|sp sp), which takes a minute and spills 384 bytes, is left out."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    paths = (str(Path(__file__).parent), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["STACK"] <= row["stack"] and row["REG"] <= row["registers"], row
        assert not row["single"] and not row["atomic"], row
