"""Compiles Triton kernels for GPUs that are not here, and reads what came out.

Run in a process without TRITON_INTERPRET: whether Triton compiles or interprets is settled when
kernels are imported.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial, wraps
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
INTEGERS = {"translation": "*i16"}
INTEGERS |= {n: "*i64" for n in ("receiver", "bra_pair", "bra_ao", "ket_pair", "ket_ao")}
INTEGERS |= {n: "*i64" for n in ("bra_span", "bra_row", "ket_span", "ket_row")}
INTEGERS |= {name: "*i32" for name in ("row_ptr", "sender", "col_ptr", "perm", "species")}
INTEGERS |= {name: "*i32" for name in ("largest", "arrived")}
JOBS = []
DOUBLES = ("x", "translations", "forces", "virials", "sent")


def assembly(kernel, real, capability, constants, sizes, options, half=()):
    """What Triton makes of a kernel, as its launcher would have it compiled.

    Args:
        kernel: the jitted function.
        real: "fp32" or "fp64", of pointers that are neither indices nor always float64.
        capability: 80 or 90.
        constants: values of the arguments that are compiled in.
        sizes: values of the integer arguments; one is compiled in, multiples of 16 are known.
        options: num_warps and others.
        half: names of pointers to float16.
    """
    constants = constants | {name: size for name, size in sizes.items() if size == 1}
    constants |= {name: None for name in kernel.arg_names if constants.get(name, 0) is None}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in sizes:
            return "i32"
        if name in half:
            return "*fp16"
        return INTEGERS.get(name, "*fp64" if name in DOUBLES else "*" + real)

    signature = {name: kind(name) for name in kernel.arg_names}
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
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {**compiled.asm, "shared": compiled.metadata.shared}


def findings(asm):
    """Registers, bytes of stack and of shared memory, how often instructions of a kind occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        used = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", used)}
    patterns = {
        "spill": r"\b(LDL|STL)\b",
        "matrix": r"\b(HMMA|HGMMA|DMMA)\b",
        "warp_group": r"\bHGMMA\b",
        "wide_load": r"\b(LDG\.E\S*\.128|LDGSTS\.E\S*\.128)",
        "load": r"\b(LDG|LDGSTS)\.E",
        "wide_add": r"\bREDG?\.E\.ADD\.F32x4",
        "add": r"\b(REDG?|ATOMG?)\.E",
        "tf32": r"\.TF32",
    }
    return (
        found
        | {name: len(re.findall(p, sass)) for name, p in patterns.items()}
        | {"shared": asm.get("shared", 0)}
        | {"lines": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))}
    )


def _tool(name, *arguments):
    command = [os.path.join(TOOLS, name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def job(function):
    """Its calls wait until `work` has them done."""

    @wraps(function)
    def later(*arguments, **settings):
        JOBS.append(partial(function, *arguments, **settings))

    return later


def work():
    """All jobs, by as many processes as there are cores; what they print comes in their order."""
    with get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for said in pool.imap(_printed, range(len(JOBS))):
            sys.stdout.write(said)


def _printed(number):
    with redirect_stdout(io.StringIO()) as said:
        JOBS[number]()
    return said.getvalue()
