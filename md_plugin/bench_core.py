"""What every case of the bench is made of, and the one loop that checks and times.

    Provider    one implementation: how to check it, how to time it once
    Contest     providers that do the same work on the same input
    run         Contest -> Rows: all checks first, then rounds A B C, C A B, ...

A provider whose error against float64 exceeds its tolerance, or is not a number, is reported and
not timed. Before each check memory that was just freed is full of NaN (`poison`), so that output
which is allocated but not written shows. The first of our providers is timed twice, as a provider
of its own, "(again)": what differs between the two is noise.

Seconds are those of the process on one thread, and of the wall clock on several. Speed is a ratio
of medians within one contest: of the reference peer to the provider.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS, HIPPYNN, OTHER = "ours", "hippynn", "other"
NO_PEER = "not installed: pip install 'md-plugin[hippynn]'"
FLOAT32 = 2e-5  # relative: a few hundred roundings of 6e-8 each, in several layers


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        atoms: wanted number of atoms in the cases that have one size.
        rounds: timed rounds.
        threads: of torch and numba.
        quick: tiny sizes: does everything work?
        seed: of all inputs.
        kept: whether this process keeps freed memory (`md_plugin.memory`), as `lmp` does too.
    """

    atoms: int = 2000
    rounds: int = 7
    threads: int = 1
    quick: bool = False
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))
    kept: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds that count: of this process on one thread, of the wall on several."""
        return time.process_time if self.threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Provider:
    """One implementation of the work of a contest.

    Attributes:
        name: as in the tables.
        side: OURS, HIPPYNN or OTHER.
        call: the work; what it returns is thrown away, or is the seconds where `own_clock`.
        error: largest deviation from float64, relative to the largest value; it returns None for
            a potential of somebody else, which is there for scale and only has to run.
        before: not timed, before each call: new inputs.
        tolerance: largest allowed error.
        own_clock: `call` returns its own seconds (of another process).
        absent: why it cannot run; "" where it can.
    """

    name: str
    side: str
    call: Callable[[], Any] = lambda: None
    error: Callable[[], float | None] | None = None
    before: Callable[[], Any] = lambda: None
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
    """

    what: str
    providers: tuple[Provider, ...]
    peer: str | None = None
    atoms: int = 0
    flop: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)


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
        notes: of the contest.
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
    notes: Mapping[str, Any] = field(default_factory=dict)


def run(case: str, contest: Contest, options: Options) -> list[Row]:
    """Check every provider, then time those that are right, in interleaved rounds."""
    rows, fit = [], []
    for provider in contest.providers:
        status, error = _checked(provider)
        rows.append(Row(case, contest.what, provider.name, provider.side, status, error))
        if status == "ok":
            fit.append(provider)
    ours = next((p for p in fit if p.side == OURS), None)
    if ours is not None:
        fit.append(replace(ours, name=f"{ours.name} (again)"))
        first = next(row for row in rows if row.provider == ours.name)
        rows.append(replace(first, provider=fit[-1].name))
    try:
        times = interleave(fit, options)
    except Exception as problem:  # as above; which one it was stands in the message at best
        return [replace(r, status=_failure(problem)) if r.status == "ok" else r for r in rows]
    return _finished(rows, times, contest)


def _checked(provider: Provider) -> tuple[str, float | None]:
    if provider.absent:
        return provider.absent, None
    if provider.error is None:
        return "ok", None
    poison()
    # Whatever goes wrong in somebody's code is a result of this provider, not the end of the bench.
    try:
        error = provider.error()
    except Exception as problem:
        return _failure(problem), None
    if error is None:
        return "ok", None
    if not error <= provider.tolerance:
        return f"wrong: error {error:.1e}, allowed {provider.tolerance:.0e}", error
    return "ok", error


def _failure(problem: Exception) -> str:
    words = " ".join(str(problem).split())
    return f"failed: {type(problem).__name__}: {words[:300]}"


def interleave(providers: list[Provider], options: Options) -> dict[str, list[float]]:
    """Seconds of each provider, round by round, after one warm-up of each.

    Each round has an order of its own: who comes after whom decides on what is left in the caches.
    """
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    rng = np.random.default_rng(options.seed)
    for round_ in range(options.rounds + 1):
        for k in rng.permutation(len(providers)):
            provider = providers[k]
            provider.before()
            start = options.clock()
            result = provider.call()
            seconds = float(result) if provider.own_clock else options.clock() - start
            if round_ > 0:
                times[provider.name].append(seconds)
    return times


def _finished(rows: list[Row], times: dict[str, list[float]], contest: Contest) -> list[Row]:
    medians = {name: float(np.median(found)) for name, found in times.items()}
    peer = medians.get(contest.peer or "")
    done = []
    for row in rows:
        row = replace(row, notes=contest.notes)
        seconds = medians.get(row.provider)
        if seconds is not None:
            low, high = np.quantile(times[row.provider], [0.2, 0.8]).tolist()
            row = replace(row, seconds=seconds, low=low, high=high)
            if peer is not None and seconds > 0:
                row = replace(row, ratio=peer / seconds)
            if contest.atoms:
                row = replace(row, us_per_atom=1e6 * seconds / contest.atoms)
            if contest.flop and seconds > 0:
                row = replace(row, gflops=1e-9 * contest.flop / seconds)
        done.append(row)
    return done


def poison(megabytes: int = 64) -> None:
    """Fill memory with NaN and free it, in blocks of many sizes: `empty` arrays are made of it."""
    blocks = []
    for power in range(8, 27):
        count = max(1, min(8, megabytes * 2**20 >> power))
        blocks += [
            torch.full((2**power // 8,), math.nan, dtype=torch.float64) for _ in range(count)
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
