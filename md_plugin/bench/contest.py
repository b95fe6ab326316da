"""From a contest to rows: all checks first, then timed rounds A B C, C A B, ...

A provider whose error against float64 exceeds its tolerance, or is not a number, is reported and
not timed. The first of our providers is timed twice, as a provider of its own, "(again)": what
differs between the two is noise.

In its turn of a round a provider makes an untimed call first: in MD a step follows a step of the
same potential, while here the caches hold what another provider left. Then it repeats the call for
at least `SECTION` seconds; the turn's time is the mean of these calls. Where inputs are new at
every call, making them is not timed.

Seconds are those of the process on one thread, and of the wall clock on several. Speed is a ratio
of medians over rounds within one contest: of the reference peer to the provider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from md_plugin.bench.core import OURS, Contest, Options, Provider, Row, poison
from md_plugin.bench.counts import count

SECTION = 0.02  # s: far above the clock's steps and an interrupt's cost
AGAIN = " (again)"


def run(case: str, contest: Contest, options: Options) -> list[Row]:
    """Check every provider, then time those that are right, in interleaved rounds."""
    rows, fit = [], []
    for provider in contest.providers:
        status, error = _checked(provider)
        row = Row(case, contest.what, provider.name, provider.side, status, error)
        rows.append(replace(row, notes=contest.notes))
        if status == "ok":
            fit.append(provider)
    ours = next((p for p in fit if p.side == OURS), None)
    if ours is not None:
        fit.append(replace(ours, name=f"{ours.name}{AGAIN}"))
        first = next(row for row in rows if row.provider == ours.name)
        rows.append(replace(first, provider=fit[-1].name))
    try:
        times = interleave(fit, options)
        counts = {p.name: count(p.call, contest.atoms) for p in fit} if contest.counted else {}
    except Exception as problem:  # as below; which one it was stands in the message at best
        return [replace(r, status=_failure(problem)) if r.status == "ok" else r for r in rows]
    rows = [
        replace(row, notes={**row.notes, "per call": counts[row.provider]})
        if row.provider in counts
        else row
        for row in rows
    ]
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
    """Seconds per call of each provider, round by round, after one call of each that compiles.

    Each round has an order of its own: who comes after whom decides on what is left in the caches.
    """
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    rng = np.random.default_rng(options.seed)
    for provider in providers:
        _seconds(provider, 1, options.clock)
    for _ in range(options.rounds):
        for k in rng.permutation(len(providers)):
            times[providers[k].name].append(turn(providers[k], options.clock))
    return times


def turn(provider: Provider, clock: Callable[[], float]) -> float:
    """Seconds per call of a provider in its turn; see the module."""
    if provider.own_clock:
        return float(provider.call())
    once = _seconds(provider, 1, clock)
    repeats = math.ceil(SECTION / max(once, 1e-6))
    return _seconds(provider, repeats, clock) / repeats


def _seconds(provider: Provider, repeats: int, clock: Callable[[], float]) -> float:
    total = 0.0
    for _ in range(repeats if provider.before else 1):
        if provider.before:
            provider.before()
        start = clock()
        for _ in range(1 if provider.before else repeats):
            provider.call()
        total += clock() - start
    return total


def _finished(rows: list[Row], times: dict[str, list[float]], contest: Contest) -> list[Row]:
    medians = {name: float(np.median(found)) for name, found in times.items()}
    peer = medians.get(contest.peer or "")
    done = []
    for row in rows:
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
