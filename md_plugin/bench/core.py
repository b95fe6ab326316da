"""What every case of the bench is made of.

    Options     what the user asked for, of one process
    Provider    one implementation: how to check it, how to time it once
    Contest     providers that do the same work on the same input
    Row         one provider in one contest: what was found

`contest` makes rows of contests. Errors are relative to float64; `poison` fills memory with
NaN, so that output which is allocated but not written shows.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

OURS, HIPPYNN, OTHER = "ours", "hippynn", "other"
NO_PEER = "not installed: pip install 'md-plugin[hippynn]'"
FLOAT32 = 2e-5  # relative: a few hundred roundings of 6e-8 each, in several layers


@dataclass(frozen=True)
class Options:
    """What the user asked for, of one process.

    Attributes:
        atoms: wanted number of atoms in the cases that have one size.
        rounds: timed rounds.
        threads: of torch and numba.
        quick: tiny sizes: does everything work?
        seed: of all inputs.
        kept: whether processes of the cases keep freed memory (`md_plugin.memory`), as `lmp` does.
        device: where `md-plugin bench gpu` computes; others compute on the CPU.
    """

    atoms: int = 2000
    rounds: int = 7
    threads: int = 1
    quick: bool = False
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))
    kept: bool = False
    device: str = "cpu"

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds that count: of the GPU; of this process on one thread, of the wall on several."""
        if self.device.startswith("cuda"):
            return CudaClock()
        return time.process_time if self.threads == 1 else time.perf_counter


class CudaClock:
    """Seconds of the current CUDA device by its own events, since the first call.

    Each call waits until the device is done. Times between two events come in float32, so that
    they are added up from call to call.
    """

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, self._event()

    def __call__(self) -> float:
        """Seconds."""
        now = self._event()
        self._seconds, self._last = self._seconds + 1e-3 * self._last.elapsed_time(now), now
        return self._seconds

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
        return event


@dataclass(frozen=True)
class Provider:
    """One implementation of the work of a contest.

    Attributes:
        name: as in the tables.
        side: OURS, HIPPYNN or OTHER.
        call: the work; what it returns is thrown away, or is the seconds where `own_clock`.
        error: largest deviation from float64, relative to the largest value; it returns None for
            a potential of somebody else, which is there for scale and only has to run.
        before: not timed, before each call: new inputs; None where inputs are reused.
        tolerance: largest allowed error.
        own_clock: `call` returns its own seconds (of another process).
        absent: why it cannot run; "" where it can.
    """

    name: str
    side: str
    call: Callable[[], Any] = lambda: None
    error: Callable[[], float | None] | None = None
    before: Callable[[], Any] | None = None
    tolerance: float = FLOAT32
    own_clock: bool = False
    absent: str = ""


@dataclass(frozen=True)
class Contest:
    """Providers that do the same work.

    Attributes:
        what: the work, as in the tables.
        providers: who does it.
        peer: name of the provider to which ratios refer; None: each contest stands for itself.
        atoms: for seconds per atom; 0 where that says nothing.
        flop: dense floating point operations; 0 where they are not counted.
        notes: shapes and the like, for the JSON file.
        counted: whether operators, allocations and kernel calls are counted (`counts`).
    """

    what: str
    providers: tuple[Provider, ...]
    peer: str | None = None
    atoms: int = 0
    flop: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    counted: bool = False


@dataclass(frozen=True)
class Row:
    """One provider in one contest.

    Attributes:
        case: name of the case.
        what: the work.
        provider: who did it.
        side: OURS, HIPPYNN or OTHER.
        status: "ok", or why there is no time.
        error: against float64, relative; None where it was not checked.
        seconds: median of a call; None without a time. `low`, `high`: its 20 and 80 % quantiles.
        ratio: how many times faster than the peer of the contest; None without a peer.
        us_per_atom: seconds per atom, 1e-6 s.
        gflops: dense operations per second, 1e9/s.
        bytes_per_atom: of memory, held at most during a call: a slope between N and 2 N atoms.
        threads: of the process.
        notes: of the contest, and what was counted.
    """

    case: str
    what: str
    provider: str
    side: str
    status: str
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    us_per_atom: float | None = None
    gflops: float | None = None
    bytes_per_atom: float | None = None
    threads: int = 1
    notes: Mapping[str, Any] = field(default_factory=dict)


def poison(megabytes: int = 64, device: str = "cpu") -> None:
    """Fill memory with NaN and free it, in blocks of many sizes: `empty` arrays are made of it."""
    blocks = []
    for power in range(8, 27):
        count = max(1, min(8, megabytes * 2**20 >> power))
        blocks += [
            torch.full((2**power // 8,), math.nan, dtype=torch.float64, device=device)
            for _ in range(count)
        ]
    blocks.clear()


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation relative to the largest value; infinite where shapes differ."""
    if got.shape != want.shape:
        return math.inf
    deviation = float((got.detach().double() - want.double()).abs().max())
    return deviation / float(want.abs().max())


def worst(*errors: float) -> float:
    """The largest; not a number where one is not, which `max` would hide."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def peer_absence() -> str:
    """Why hippynn cannot be compared; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on sparse tensors in hippynn's tables
            import hippynn  # noqa: F401
    except ImportError:
        return NO_PEER
    return ""


def present(providers: Iterator[Provider] | list[Provider]) -> tuple[Provider, ...]:
    """The providers; those of hippynn marked absent where it is not installed."""
    missing = peer_absence()
    return tuple(
        replace(p, absent=missing) if p.side == HIPPYNN and missing else p for p in providers
    )
