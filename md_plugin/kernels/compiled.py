"""Functions that numba compiles and keeps on disk, until one of the files they are made of changes.

numba knows what it keeps by the file of the function, its bytecode, the types of its arguments and
what its closure holds; of the files that write the code of an `@intrinsic`, or of functions that it
calls, it knows nothing. So a checksum of those files goes into the closure. (As a default argument
it would do the same, but numba tells arguments that were left out apart by their Python class
alone: once two functions have different defaults, each call of one of them takes the slow way into
compiled code, 50 to 200 us instead of 1.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import numba

# error_model="numpy": the Python model would add zero-division checks that stop vectorisation.
OPTIONS = {"cache": True, "error_model": "numpy", "nogil": True}


def compiled(files: Iterable[Path], **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit` with OPTIONS, for a function whose code comes from `files` as well.

    Args:
        files: whatever writes code for it, other than its own file.
        options: of numba.njit.
    """
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in files))

    def decorate(function: Any) -> Any:
        code = function.__code__
        code = code.replace(co_freevars=(*code.co_freevars, "checksum"))
        closure = (*(function.__closure__ or ()), CellType(checksum))
        known = FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__, closure
        )
        known.__doc__, known.__module__ = function.__doc__, function.__module__
        return numba.njit(**OPTIONS, **options)(known)

    return decorate
