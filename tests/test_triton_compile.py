"""Triton kernels without a GPU: they compile for the GPUs that matter, and they say where they run.

Each test is a process of its own: whether Triton compiles or interprets is settled when the
kernels are imported.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SUMS = """
import json, torch
from triton_assembly import assembly, findings, job, work
from md_plugin.kernels import triton_gpu
from md_plugin.kernels.triton_parts import OPTIONS, PRECISION

@job
def compile(real, capability, n_nu, n_feat):
    dtype = torch.float32 if real == "fp32" else torch.float64
    for name in ("envsum", "sensesum", "featsum", "messages", "by_sender"):
        form = "featsum" if name == "messages" else name
        kernel = getattr(triton_gpu, "_" + form)
        constants = triton_gpu.tiles(form, n_nu, n_feat, dtype, groups=capability == 90)
        constants |= {"PRECISION": PRECISION[dtype], "BY_PAIR": name == "messages"}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        sizes = {"n_nu": n_nu, "n_feat": n_feat}
        sizes = {k: v for k, v in sizes.items() if k in kernel.arg_names}
        asm = assembly(kernel, real, capability, constants, sizes, OPTIONS)
        row = {"kernel": f"{name} {real} sm_{capability} {n_nu} x {n_feat}"}
        row |= {"name": name, "real": real, "capability": capability, "block": constants}
        row |= {"n_nu": n_nu, "n_feat": n_feat, "groups": "wgmma" in asm["ptx"]}
        print(json.dumps(row | findings(asm)))

for shape in ((20, 64), (80, 128), (180, 20), (9, 7), (20, 1), (1, 1)):
    compile("fp32", 90, *shape)
for shape in ((20, 64), (80, 128)):
    compile("fp32", 80, *shape)
compile("fp64", 80, 80, 128)
compile("fp64", 90, 20, 64)
compile("fp64", 90, 9, 7)
work()
"""

PRODUCTS = """
import json
from triton_assembly import assembly, findings
from md_plugin.kernels import triton_products
from md_plugin.kernels.triton_parts import OPTIONS

shapes = [("fp32", 80, 4, 20), ("fp32", 90, 9, 20), ("fp32", 90, 4, 7)]
shapes += [("fp64", 80, 9, 20), ("fp64", 90, 4, 20)]
for real, capability, n_comp, n_nu in shapes:
    for name in ("stack", "fold", "stack_along"):
        kernel = getattr(triton_products, "_" + name)
        constants = triton_products.tiles(name, n_nu, int(real[2:]) // 8)
        sizes = {"n_pair": 4801, "n_comp": n_comp, "n_nu": n_nu}
        asm = assembly(kernel, real, capability, constants, sizes, OPTIONS)
        row = {"kernel": f"{name} {real} sm_{capability} {n_comp} x {n_nu}", "n_nu": n_nu}
        row["wide_store"] = asm["ptx"].count("st.global.v4") + asm["ptx"].count("st.global.v2.b64")
        print(json.dumps(row | findings(asm)))
"""

RADIAL = """
import json, torch
from triton_assembly import assembly, findings
from md_plugin.kernels import triton_radial

for real, dtype, terms in (("fp32", torch.float32, 7), ("fp64", torch.float64, 12)):
    for name in ("sensitivity", "slope", "curvature"):
        for capability, n_nu in ((80, 20), (90, 20), (90, 7))[: 3 if name == "curvature" else 2]:
            options = {"TERMS": terms, "TRAINED": True}
            kernel = getattr(triton_radial, "_" + name)
            constants = options | triton_radial.tiles(n_nu, dtype)
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            sizes = {"n_pair": 4801, "n_nu": n_nu}
            asm = assembly(kernel, real, capability, constants, sizes, triton_radial.OPTIONS)
            row = {"kernel": f"{name} {real} sm_{capability} {n_nu}", "n_nu": n_nu}
            row["compiled_in"] = [x.name for x in kernel.params if x.is_constexpr]
            print(json.dumps(row | findings(asm)))
"""

LAYERS = """
import json, torch
from triton_assembly import assembly, findings, job, work
from md_plugin.kernels import triton_arrays, triton_fused, triton_layer, triton_mirror

LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")
REAL = {"fp16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
FORMS = {"fp16": ((1,), torch.float16), "fp32": ((2,), torch.float16), "fp64": ((), torch.float64)}

def report(name, kernel, kind, capability, shape, constants, sizes):
    options = {key: constants.pop(key) for key in LAUNCH}
    real, half = (kind, ()) if kind == "fp64" else ("fp32", ("z", "ge", "env"))
    if kind == "fp64" and "scale" in kernel.arg_names:
        constants["scale"] = None
    found = findings(assembly(kernel, real, capability, constants, sizes, options, half))
    compiled_in = [x.name for x in kernel.params if x.is_constexpr]
    row = {"kernel": f"{name} {kind} sm_{capability} {shape}", "n_comp": shape[0], "name": name}
    row |= {"capability": capability, "one_hot": shape[1] < 16, "real": kind}
    print(json.dumps(row | found | {"compiled_in": compiled_in}))

@job
def layer(kind, capability, n_comp, n_feat, shifted=False, own_row=False, atoms=False):
    for name in ("backward",) if own_row else ("forward", "backward"):
        kernel, back = getattr(triton_layer, name + "_kernel"), name == "backward"
        front, dtype = FORMS[kind]
        env = torch.empty(*front, 1, n_comp, 20, n_feat, dtype=dtype, device="meta")
        radial = triton_arrays.Radial(env.to(REAL[kind]), env)
        constants = triton_fused.options(radial, env, back)
        if back:
            constants["OWN_ROW"] = own_row
            constants |= {} if atoms else {"sent": None}
        constants |= {"z" if n_feat < 16 else "species": None}
        if not shifted:
            constants |= {"translation": None, "translations": None}
        sizes = {"begin": 16, "n_send": 1601}
        kernel_name = "own " * own_row + name
        report(kernel_name, kernel, kind, capability, (n_comp, n_feat), constants, sizes)

@job
def mirror(kind, capability, n_comp, n_hidden):
    g = torch.empty(1, n_comp, n_hidden, dtype=REAL[kind], device="meta")
    constants = triton_fused.mirror_options(g, 20) | {"translation": None, "translations": None}
    sizes = {"begin": 16, "n_nu": 20, "n_hidden": n_hidden}
    kernel = triton_mirror.mirror_kernel
    report("mirror", kernel, kind, capability, (n_comp, n_hidden), constants, sizes)

layer("fp32", 90, 1, 4, True, atoms=True)
for capability in (80, 90):
    layer("fp32", capability, 1, 64, True)
    for n_comp, n_feat in ((4, 128), (9, 32), (16, 32)):
        layer("fp32", capability, n_comp, n_feat)
    for n_comp, n_feat in ((1, 64), (4, 128), (9, 64), (16, 32)):
        layer("fp16", capability, n_comp, n_feat)
layer("fp64", 80, 1, 64)
layer("fp64", 90, 4, 128, True)
layer("fp32", 90, 4, 128, own_row=True)
layer("fp32", 80, 9, 32, own_row=True)
mirror("fp32", 90, 4, 128)
mirror("fp32", 80, 9, 32)
work()
"""


HALVES = """
import json, torch
from triton_assembly import assembly, findings, job, work
from md_plugin.kernels import triton_halves, triton_matmul

@job
def report(name, kernel, capability, constants, sizes, half, **more):
    launch = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    found = findings(assembly(kernel, "fp32", capability, constants, sizes, launch, half))
    print(json.dumps({"kernel": name, "capability": capability, **more} | found))

def product(capability, tile, n_half, back=False):
    n_sum, n_col, out = (128, 2560, torch.float16) if back else (2560, 128, torch.float32)
    split, half = tile.n_share > 1 and not tile.wide, ("a", "b", "out") if back else ("a", "b")
    kernel = triton_matmul.wide_kernel if tile.wide else triton_matmul.product_kernel
    constants = triton_matmul.options(tile, n_sum, n_col, n_half, out)
    absent = [] if split else ["parts", "arrived"]
    absent += ["first", "second"] if back else []
    constants |= {name: None for name in absent if name in kernel.arg_names}
    sizes = {"n_row": 1535, "n_sum": n_sum, "n_col": n_col, "n_step": 3}
    report(f"product {n_half} {tile}", kernel, capability, constants, sizes, half, split=split)

for capability in (80, 90):
    for n_half in (1, 2):
        first, *others = triton_matmul.tiles(2560, 128, n_half, capability == 90)
        shared = [tile for tile in (first, *others) if tile.n_share == 4]
        for tile in shared if n_half == 2 else (first,):
            product(capability, tile, n_half)
        narrow, *others = triton_matmul.tiles(128, 2560, n_half, capability == 90)
        product(capability, next(tile for tile in others if tile.wide), n_half, back=True)
    product(capability, narrow, 2, back=True)
    n = {"n": 6400001}
    block = {"BLOCK": triton_halves.BLOCK, "ALIGN": 16}
    report("largest", triton_halves.largest_kernel, capability, {**block}, n, ())
    block |= {"N_HALF": 2, "PARTS": triton_halves.PARTS}
    report("split", triton_halves.split_kernel, capability, block, n | {"n_part": 512}, ("halves",))
    rows = {"N_HALF": 2, "BLOCK_R": 4, "BLOCK_C": 512}
    sizes = {"n_row": 1001, "size": 512}
    report("rows", triton_halves.split_rows_kernel, capability, rows, sizes, ("halves",))
work()
"""


def run_python(code, tmp_path):
    """A fresh interpreter without TRITON_INTERPRET and with an empty Triton cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(Path(__file__).parent), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = tmp_path / "script.py"  # Triton reads the source of kernels from files
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


compiles = pytest.mark.skipif(
    sys.platform != "linux", reason="triton's wheel has ptxas on Linux only"
)


@compiles
def test_sums_compile_for_a100_and_h100(tmp_path):
    """Matrix instructions, 16 bytes at once, reductions only where they are meant, no spills."""
    rows = [json.loads(line) for line in run_python(SUMS, tmp_path).splitlines()]
    assert len(rows) == 5 * 11
    for row in rows:
        single, hopper = row["real"] == "fp32", row["capability"] == 90
        # What triton 3.6 leaves there in float64 on H100.
        known = 16 if row["name"] in ("featsum", "messages") and not single else 0
        assert row["STACK"] <= known and (known or row["spill"] == 0), row
        # 65536 registers per multiprocessor: three blocks of 128 threads at once.
        assert row["REG"] <= 168, row
        multiplies = row["name"] != "by_sender"
        assert (row["matrix"] > 0) == multiplies, row
        assert (row["tf32"] > 0) == (single and multiplies), row
        # 64 rows of a product: features in envsum, pairs in the others.
        group = single and hopper and multiplies
        assert row["groups"] == (group and (row["name"] != "envsum" or row["n_feat"] >= 64)), row
        assert (row["add"] > 0) == (row["name"] == "featsum"), row
        if row["add"] and single and hopper and row["n_feat"] % 4 == 0:
            assert row["wide_add"] == row["add"], row  # four features in one reduction
        if row["n_feat"] >= 20:
            assert row["wide_load"] > 0, row


@compiles
def test_products_compile_for_a100_and_h100(tmp_path):
    rows = [json.loads(line) for line in run_python(PRODUCTS, tmp_path).splitlines()]
    assert len(rows) == 3 * 5
    for row in rows:
        assert row["STACK"] == 0 and row["spill"] == 0 and row["REG"] <= 168, row
        assert row["add"] == 0, f"the order of additions is not fixed: {row}"
        # 20 sensitivities start at multiples of 16 bytes, 7 do not.
        assert (row["wide_load"] > 0) == (row["wide_store"] > 0) == (row["n_nu"] == 20), row


@compiles
def test_sensitivities_compile_for_a100_and_h100(tmp_path):
    rows = [json.loads(line) for line in run_python(RADIAL, tmp_path).splitlines()]
    assert len(rows) == 2 * 7
    for row in rows:
        assert row["STACK"] == 0 and row["spill"] == 0, row
        # Three blocks of 128 threads at once; rows at odd places leave a thread many pairs.
        assert row["REG"] <= (168 if row["n_nu"] == 20 else 255), row
        assert row["add"] == 0, f"the order of additions is not fixed: {row}"
        # Nothing of a model but its number of sensitivities.
        assert set(row["compiled_in"]) <= {"TERMS", "TRAINED", "ALIGN", "BLOCK_P", "BLOCK_NU"}
        # 20 sensitivities start at multiples of 16 bytes, 7 do not.
        assert (row["wide_load"] > 0) == (row["n_nu"] == 20), row


OF_A_MODEL = {"rcut", "end", "RCUT", "END", "mu", "sigma"}


# Bytes of local memory on the way back, with triton 3.9; nothing else takes any.
SPILLED = {("fp32", 4, 80): 24, ("fp32", 4, 90): 8, ("fp16", 9, 90): 8}
SPILLED |= {("fp32", 16, 80): 56, ("fp32", 16, 90): 112}


@compiles
def test_fused_layers_compile_for_a100_and_h100(tmp_path):
    """Matrix instructions, 16 bytes at once to and from features, and little in local memory."""
    rows = [json.loads(line) for line in run_python(LAYERS, tmp_path).splitlines()]
    assert len(rows) == 2 * (1 + 2 * 8 + 2) + 4
    for row in rows:
        name, n_comp, capability = row["name"], row["n_comp"], row["capability"]
        known = SPILLED.get((row["real"], n_comp, capability), 0) if name == "backward" else 0
        if not version("triton").startswith("3.9."):  # 3.6 takes at most 216, mostly in mirrors
            known = 0 if name == "forward" or n_comp == 1 else max(known, 216)
        assert row["STACK"] <= known, row
        assert known or row["spill"] == 0, row
        assert row["REG"] <= (168 if name == "forward" and n_comp > 4 else 255), row
        dots = name != "backward" or not row["one_hot"]
        assert (row["matrix"] > 0) == dots, row
        assert (row["tf32"] > 0) == (name == "mirror"), row
        assert row["one_hot"] or row["wide_load"] > 0, row
        assert not OF_A_MODEL & set(row["compiled_in"]), row
        # Forces, 3 of the sender and 3 of the receiver, and the message; else no atomics.
        least = (6 if row["one_hot"] else 7) if name == "backward" else 0
        assert row["add"] >= least and (least or row["add"] == 0), row
        if least == 7 and row["real"] != "fp64" and capability == 90:
            assert row["wide_add"] > 0, row


@compiles
def test_halves_compile_for_a100_and_h100(tmp_path):
    """Matrix instructions, warp groups on H100, three stages of 16-byte copies, no spills."""
    rows = [json.loads(line) for line in run_python(HALVES, tmp_path).splitlines()]
    assert len(rows) == 2 * (2 + 4 + 1 + 3) - 1  # 64 x 128 with warp groups only
    for row in rows:
        assert row["STACK"] == 0 and row["spill"] == 0, row
        assert row["wide_load"] > 0, row
        if "split" not in row:
            assert row["matrix"] == 0 and row["REG"] <= 64, row
            assert row["wide_load"] >= row["load"] - 2, row  # but two powers
            continue
        assert row["matrix"] > 0, row
        assert (row["warp_group"] > 0) == (row["capability"] == 90), row
        assert row["load"] - row["wide_load"] <= 2, row
        # One program of 256 threads, or two of 128, have 255 registers per thread, and 227 kB of
        # shared memory; of other GPUs some have 99.
        assert row["REG"] <= 255, row
        assert row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024, row
        # Only a split sum counts who has arrived.
        assert row["add"] == (1 if row["split"] else 0), row


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
