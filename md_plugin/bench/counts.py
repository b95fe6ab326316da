"""What a call asks of the machine besides time: operators, allocations, calls of kernels.

    aten operators       that torch dispatches during the call, backward passes included
    bytes per atom       of results of these operators that are new memory, not views
    numba calls          of functions that numba compiled, from Python, on one thread

Memory that numpy or compiled code allocates is not seen here; `memory` sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numba.core.registry import CPUDispatcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATORS, BYTES, CALLS = "aten operators", "bytes of their results per atom", "numba calls"


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and bytes of their results that are not memory of their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in _tensors((args, kwargs))}
        self.operators += 1
        self.bytes += sum(x.nbytes for x in _tensors(result) if _storage(x) not in given)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    """Those that are dense."""
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def numba_calls() -> Iterator[list[str]]:
    """One block of code; names of the compiled functions that Python calls in it."""
    names: list[str] = []
    plain = CPUDispatcher.__call__  # of C, inherited: counting lies over it for a while

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.py_func.__name__)
        return plain(self, *args, **kwargs)

    CPUDispatcher.__call__ = counting
    try:
        yield names
    finally:
        del CPUDispatcher.__call__


def count(call: Callable[[], Any], atoms: int) -> dict[str, int]:
    """Operators, bytes per atom and numba calls of one call, which has run before.

    Counted on one thread: torch tells of the operators of the calling thread only.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with numba_calls() as names, _Operators() as seen:
            call()
    finally:
        torch.set_num_threads(threads)
    return {OPERATORS: seen.operators, BYTES: round(seen.bytes / max(atoms, 1)), CALLS: len(names)}
