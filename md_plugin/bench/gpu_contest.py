"""Contests of `md-plugin bench gpu`: right before fast, then three steps, then timed rounds.

Every provider is first right on another structure, then makes three steps of the timed one (with
graphs: one as it is, one recorded, one replayed), which tell the seconds of the first and the peak
of memory beyond what was held before; what fails in that is a row with the reason. The others are
timed in interleaved rounds (`contest`), by events of the device.

hippynn runs on its Triton kernels (on a CPU, on numba's) and gets pairs within the cutoff, on the
device; ours get positions and a list with skin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch

from md_plugin.bench.contest import AGAIN, run
from md_plugin.bench.core import (
    FLOAT32,
    HIPPYNN,
    Contest,
    Options,
    Provider,
    Row,
    peer_absence,
    poison,
)
from md_plugin.bench.gpu_systems import MOLECULE, DeviceProblem, Workload, counts
from md_plugin.bench.systems import CHECKED_ATOMS, Twin
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

FAST = 2e-3  # relative: operands in float16; 2e-4 to 6e-4 with these networks, interpreted
HELD = "bytes beyond inputs"
FIRST = "first steps here, s"  # of the checked and of the timed structure: compiling, tuning
Make = Callable[[], Callable[[DeviceProblem], Any]]  # what does the work; made when it is first due


@dataclass
class Entry:
    """One who does the work.

    Attributes:
        name, side: as in `Provider`.
        make: gives what computes a problem.
        tolerance: largest allowed error.
        half: whether sums are in float16.
        absent: why it cannot run here; "" where it can.
        noted: what its first steps told.
    """

    name: str
    side: str
    make: Make
    tolerance: float = FLOAT32
    half: bool = False
    absent: str = ""
    noted: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is to be done: `passes` evaluations by count, of a load with these weights."""

    what: str
    load: Workload
    net: Hipnn
    options: Options
    passes: int = 1


def timed(task: Task, who: list[Entry], absent: str, error: Callable[..., float]) -> Iterator[Row]:
    """Rows of all entries; error is of the net, a problem, and what was found for it."""
    options, load = task.options, task.load
    unit = MOLECULE if load.molecules else 1
    checked = min(CHECKED_ATOMS, load.atoms) // unit * unit
    small, large = load.problem(options, checked, seed=1), load.problem(options)

    def provider(entry: Entry) -> Provider:
        made = cache(entry.make)

        def call() -> Any:
            return made()(large)

        def check() -> float:
            poison(device=options.device)
            clock = options.clock
            start = clock()
            found = made()(small)
            seconds = clock() - start
            off = error(task.net, small, found)
            if off <= entry.tolerance:
                entry.noted = first_steps(call, options)
                entry.noted[FIRST] += seconds
            return off

        missing = entry.absent or (absent if entry.side == HIPPYNN else "")
        return Provider(entry.name, entry.side, call, check, None, entry.tolerance, absent=missing)

    n, pairs = len(large.species), large.inside[0]
    notes = large.notes() | {"floor": counts(load.network(), pairs), "passes": task.passes}
    providers = tuple(map(provider, who))
    contest = Contest(task.what, providers, peer_name(options), n, notes=notes)
    known = {entry.name: entry for entry in who}
    for row in run("", contest, options):
        entry = known[row.provider.removesuffix(AGAIN)]
        held = entry.noted.get(HELD)
        row = replace(row, notes={**row.notes, **entry.noted, "half": entry.half})
        yield row if held is None else replace(row, bytes_per_atom=held / n)


def first_steps(call: Callable[[], Any], options: Options) -> dict[str, Any]:
    """Seconds of the first of three steps, and the peak of memory beyond what was held before."""
    before, clock = held(options), options.clock
    start = clock()
    call()
    noted: dict[str, Any] = {FIRST: clock() - start}
    for _ in range(2):
        call()
    return noted if before is None else {**noted, HELD: torch.cuda.max_memory_allocated() - before}


def held(options: Options) -> int | None:
    """Bytes of the GPU that are in use, from where on the peak is counted; None on a CPU."""
    if not options.device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def potential(
    net: Hipnn, options: Options, *, dtype: str = "mixed", graphs: str = "auto"
) -> Potential:
    """The same weights on the device, on Triton; on a CPU on numba, but for "fast"."""
    on_gpu = options.device.startswith("cuda")
    twin = Hipnn(net.config, backend="triton" if on_gpu or dtype == "fast" else "auto")
    twin.load_state_dict(net.state_dict())
    made = Potential(twin, device=options.device, dtype=dtype)
    made.graphs = graphs
    return made


def their(kind: Callable[..., Any], net: Hipnn, options: Options) -> Make:
    """hippynn's network of the same weights, at this work."""
    return lambda: partial(kind, Twin(net, options.device))


def peer_name(options: Options) -> str:
    """hippynn with the kernels that it runs on."""
    return f"hippynn, {'triton' if options.device.startswith('cuda') else 'numba'}"


@contextmanager
def peer_kernels(options: Options) -> Iterator[str]:
    """One block of code with hippynn on these kernels; gives why it is absent, "" if it is not."""
    if peer_absence():
        yield peer_absence()
        return
    from hippynn import custom_kernels

    before = custom_kernels.CUSTOM_KERNELS_ACTIVE
    absent = ""
    try:
        custom_kernels.set_custom_kernels(peer_name(options).split()[-1])
    except Exception as problem:  # of hippynn, where it does not know this card or version
        absent = f"absent: {type(problem).__name__}: {problem}"
    try:
        yield absent
    finally:
        if before:
            custom_kernels.set_custom_kernels(before)
