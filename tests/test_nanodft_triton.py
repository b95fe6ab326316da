"""The Triton kernel of nanodft: right under the interpreter, and it compiles for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyscf", reason="pyscf is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from test_nanodft_gradient import HAVE_TRITON, gradient, random_density
from test_nanodft_integrals import system, worst


@pytest.mark.skipif(not HAVE_TRITON, reason="no GPU, and TRITON_INTERPRET is not set")
@pytest.mark.parametrize("name, hyb", [("H2", 0.0), ("H2", 1.0), ("H2O", 0.0), ("H2O", 0.2)])
def test_triton_against_torch(name, hyb):
    basis, x = system(name, "sto-3g")
    dm = random_density(basis)
    want = gradient(basis, x, dm, hyb, "torch")
    assert worst(gradient(basis, x, dm, hyb, "triton"), want) < 1e-9


COMPILE = """
import json, re
from triton_assembly import assembly, findings
from md_plugin.nanodft import triton_gpu

kernel, constants = triton_gpu._potential, triton_gpu.constants(2, 1, True)
sizes = {"n_bra": 41, "n_ket": 57, "n_dm": 7}
for capability in (80, 90):
    asm = assembly(kernel, "fp64", capability, constants, sizes, triton_gpu._OPTIONS)
    row = findings(asm)
    row["single"] = re.findall(r"[a-z.]+\\.f32", asm["ptx"])
    row["atomic"] = ".red." in asm["ptx"] or "atom." in asm["ptx"]
    print(json.dumps(row))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheel has ptxas on Linux only")
def test_the_kernel_compiles_for_a100_and_h100(tmp_path):
    """(sp s|sp s); (sp sp|sp sp) takes a minute and spills 384 bytes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    paths = (str(Path(__file__).parent), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for row in map(json.loads, done.stdout.splitlines()):
        assert row["STACK"] == 0 and row["REG"] <= 168, row
        assert not row["single"] and not row["atomic"], row
