"""Triton kernels without a GPU: they compile for the GPUs that matter, and they say where they run.

Each test is a process of its own: whether Triton compiles or interprets is settled when the
kernels are imported.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from md_plugin.kernels import triton_gpu

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
POINTERS = {"receiver": "*i64"}
POINTERS |= {name: "*i32" for name in ("row_ptr", "sender", "col_ptr", "perm")}

def compiled(sum_name, real, capability, n_nu, n_feat):
    kernel = getattr(triton_gpu, "_" + sum_name)
    # As Triton's launcher does: a size of one is compiled in, multiples of 16 are known as such.
    sizes = {"n_nu": n_nu, "n_feat": n_feat}
    constants = triton_gpu.tiles(sum_name, n_nu, n_feat)
    constants |= {name: size for name, size in sizes.items() if size == 1}
    signature = {
        name: "constexpr" if name in constants
        else "i32" if name in ("n_nu", "n_feat")
        else POINTERS.get(name, "*" + real)
        for name in kernel.arg_names
    }
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={
            (position(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or (kind == "i32" and sizes[name] % 16 == 0)
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=triton_gpu._OPTIONS).asm

def resources(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK):(\\d+)", text)}

for sum_name in ("envsum", "sensesum", "featsum"):
    for real in ("fp32", "fp64"):
        for capability in (80, 90):
            for n_nu, n_feat in ((20, 64), (7, 41), (1, 1)):
                asm = compiled(sum_name, real, capability, n_nu, n_feat)
                row = {"kernel": f"{sum_name} {real} sm_{capability} {n_nu} x {n_feat}"}
                row["tf32"] = "tf32" in asm["ptx"]
                row["atomic"] = ".red." in asm["ptx"] or "atom." in asm["ptx"]
                print(json.dumps(row | resources(asm)))
"""


def run_python(code, tmp_path):
    """A fresh interpreter without TRITON_INTERPRET and with an empty Triton cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = tmp_path / "script.py"  # Triton reads the source of kernels from files
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheel has ptxas on Linux only")
def test_kernels_compile_for_a100_and_h100(tmp_path):
    rows = [json.loads(line) for line in run_python(COMPILE, tmp_path).splitlines()]
    assert len(rows) == 3 * 2 * 2 * 3
    for row in rows:
        # 8 bytes: what triton 3.6 leaves in the 1 x 1 form of featsum.
        assert row["STACK"] <= 8, f"registers spill: {row}"
        # 65536 registers per multiprocessor: at least three blocks of 128 threads at once.
        assert row["REG"] <= 168, row
        assert not row["tf32"], f"float32 sums are rounded to tf32: {row}"
        assert not row["atomic"], f"the order of additions is not fixed: {row}"


def test_cpu_tensors_without_the_interpreter(tmp_path):
    code = """
import torch
from md_plugin.kernels import BackendError, get_backend, list_backends, triton_gpu
from md_plugin.pairs import Pairs

pairs, _ = Pairs.from_edges(torch.tensor([0]), torch.tensor([0]), 1, 1)
try:
    triton_gpu.envsum(torch.ones(1, 1), torch.ones(1, 1), pairs)
except ValueError as error:
    print(error)
print(list_backends()["triton"] or "no reason")
try:
    get_backend("triton").envsum(torch.ones(1, 1), torch.ones(1, 1), pairs)
except BackendError as error:
    print(error)
"""
    raw, reason, chosen = run_python(code, tmp_path).splitlines()
    assert "backend 'triton' computes on CUDA devices, but the tensors are on cpu" in raw
    assert "backend='numba'" in raw and "TRITON_INTERPRET=1" in raw
    if reason == "no reason":  # a machine with a GPU
        assert "backend 'triton' computes on cuda, not on cpu" in chosen
    else:
        assert "no CUDA device was found" in reason
        assert "backend 'triton' is not available: no CUDA device was found" in chosen
