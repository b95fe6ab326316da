"""The Triton kernel of nanodft: right under the interpreter, and it compiles for GPUs."""

import json
import os
import subprocess
import sys

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
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from md_plugin.nanodft import triton_gpu

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
KINDS = {"n_bra": "i32", "n_ket": "i32", "n_dm": "i32"}
KINDS |= {name: "*i64" for name in ("bra_pair", "bra_ao", "ket_pair", "ket_ao")}
kernel, constants = triton_gpu._potential, triton_gpu.constants(2, 1, True)
source = ASTSource(
    fn=kernel,
    signature={
        n: "constexpr" if n in constants else KINDS.get(n, "*fp64") for n in kernel.arg_names
    },
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
for capability in (80, 90):
    target = GPUTarget("cuda", capability, 32)
    asm = triton.compile(source, target=target, options=triton_gpu._OPTIONS).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    row = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\\d+)", text)}
    row["single"] = re.findall(r"[a-z.]+\\.f32", asm["ptx"])
    row["atomic"] = ".red." in asm["ptx"] or "atom." in asm["ptx"]
    print(json.dumps(row))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheel has ptxas on Linux only")
def test_the_kernel_compiles_for_a100_and_h100(tmp_path):
    """(sp s|sp s); (sp sp|sp sp) takes a minute and spills 384 bytes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for row in map(json.loads, done.stdout.splitlines()):
        assert row["STACK"] == 0 and row["REG"] <= 168, row
        assert not row["single"] and not row["atomic"], row
