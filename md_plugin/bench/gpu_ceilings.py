"""What a GPU can do at most: ceilings of the card that a run of `md-plugin bench gpu` is held to.

    copy            read and written bytes of 1 GB that is copied
    gemm            2 n^3 operations of a product of n x n matrices, n = 4096, by precision
    gather          read and written bytes of rows of 256 and 512 bytes, picked at random, 16 MB out
                    of 16 MB, in a CUDA graph: both stay in an L2 cache of 40 MB or more
    graph node      a tiny kernel in a CUDA graph of 1,000
    launch          a tiny kernel launched from Python

All of them are the best of five; sizes are tiny on a CPU, where there are no graphs.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from md_plugin.bench.contest import turn
from md_plugin.bench.core import OURS, Options, Provider
from md_plugin.model.graphs import CudaRecorder

NODES, GATHERS = 1000, 50  # in a graph
BEST_OF = 5


def ceilings(options: Options) -> dict[str, float]:
    """Numbers by name; the unit is the end of each name."""
    on_gpu = options.device.startswith("cuda")
    n_copy, n, n_gather = (2**27, 4096, 2**24) if on_gpu else (2**12, 32, 2**12)
    found = {"copy_gb_per_s": copy(n_copy, options)}
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp16", torch.float16, "highest"),
    ):
        found[f"gemm_{name}_tflops"] = gemm(n, dtype, precision, options)
    for row in (256, 512):
        found[f"gather_{row}_gb_per_s"] = gather(n_gather, row, options)
    if on_gpu:
        found["graph_node_us"] = graph_node(options)
    found["launch_us"] = launch(options)
    return found


def card(options: Options) -> dict[str, Any]:
    """Name, size and software of the device; of a CPU, its name alone."""
    if not options.device.startswith("cuda"):
        return {"name": f"{options.device}: tiny sizes, to see that everything works"}
    found = torch.cuda.get_device_properties(options.device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "bytes": found.total_memory,
        "CUDA of torch": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.split()), None)


def copy(n: int, options: Options) -> float:
    """GB/s, of n float64 numbers."""
    source = torch.ones(n, dtype=torch.float64, device=options.device)
    target = torch.empty_like(source)
    return 16e-9 * n / best(lambda: target.copy_(source), options)


def gemm(n: int, dtype: torch.dtype, precision: str, options: Options) -> float:
    """TFLOP/s of n x n matrices; precision is that of products of float32."""
    a, b = torch.randn(2, n, n, device=options.device).to(dtype)
    out, before = torch.empty_like(a), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2e-12 * n**3 / best(lambda: torch.mm(a, b, out=out), options)
    finally:
        torch.set_float32_matmul_precision(before)


def gather(n_bytes: int, row: int, options: Options) -> float:
    """GB/s, of n_bytes in rows of so many bytes."""
    table = torch.randn(n_bytes // row, row // 4, device=options.device)
    index = torch.randint(len(table), (len(table),), device=options.device)
    out = torch.empty_like(table)

    def pick() -> None:
        torch.index_select(table, 0, index, out=out)

    # From Python a launch would take as long as the rows.
    seconds = in_graph(pick, GATHERS, options) if table.is_cuda else best(pick, options)
    return 2e-9 * out.nbytes / seconds


def graph_node(options: Options) -> float:
    """us, of a kernel that adds one to a number."""
    x = torch.zeros(1, device=options.device)
    return 1e6 * in_graph(lambda: x.add_(1.0), NODES, options)


def in_graph(call: Callable[[], Any], count: int, options: Options) -> float:
    """Seconds of a call, of which a CUDA graph has so many."""
    recorder = CudaRecorder(torch.device(options.device))

    def calls() -> None:
        for _ in range(count):
            call()

    recorder.warm_up(calls)
    play, _ = recorder.capture(calls)
    return best(play, options) / count


def launch(options: Options) -> float:
    """us, until Python goes on."""
    x = torch.zeros(1, device=options.device)

    def once() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(NODES):
            x.add_(1.0)
        return time.perf_counter() - start

    return 1e6 * min(once() for _ in range(BEST_OF)) / NODES


def best(call: Callable[[], Any], options: Options) -> float:
    """Seconds of a call: the least of some turns, each at least 20 ms long."""
    provider = Provider("ceiling", OURS, call)
    clock = options.clock
    return max(min(turn(provider, clock) for _ in range(BEST_OF)), 1e-9)
