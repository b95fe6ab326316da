"""Threads of Python that share work on blocks of atoms.

Each takes its atoms through kernels and matrix products alike and waits for the others once per
layer, where threads inside each kernel and each product would wait a hundred times. What they call
lets go of the interpreter's lock: numba's functions (`compiled`) and torch's operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from threading import Barrier

import torch


def share(work: Callable[[int], None], n_thread: int) -> None:
    """Call work(0) .. work(n_thread - 1), each in a thread in which torch has one thread.

    The caller's own thread takes work(0). Returns when all have ended; raises what one of them
    raised. One alone runs as if it had been called.
    """
    if n_thread == 1:
        work(0)
        return
    pool = _pool(1 << (n_thread - 2).bit_length(), os.getpid())
    others = [pool.submit(work, t) for t in range(1, n_thread)]
    try:
        with one_thread():
            work(0)
    finally:
        wait(others)
    for part in others:
        part.result()


def span(n: int, t: int, n_thread: int) -> slice:
    """The contiguous part of n atoms that thread t has."""
    return slice(n * t // n_thread, n * (t + 1) // n_thread)


@contextmanager
def one_thread() -> Iterator[int]:
    """A block of code in which torch has one thread here; gives how many it had.

    Threads that OpenMP keeps spinning after each small operation would slow the workers down.
    """
    wanted = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield wanted
    finally:
        torch.set_num_threads(wanted)


@lru_cache(maxsize=1)
def _pool(n_thread: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork has none of its parent's. A power of two: rarely another."""
    wanted = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_thread, "md_plugin", _one_thread)
    started = Barrier(n_thread)
    list(pool.map(lambda _: started.wait(), range(n_thread)))
    # What a thread sets for itself is also what torch gives to every thread that starts later.
    torch.set_num_threads(wanted)
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # the first time in a thread, this sets what all threads start with
    torch.set_num_threads(1)
