"""Memory: freed memory is kept for the next step, in processes that belong to this project.

A step makes and frees temporaries of some megabytes. glibc gives such blocks back to the kernel at
once, and the next step pays for fresh, zeroed pages: about a third of an MD step of 250 atoms.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, up to 1 GiB; returns whether it took the advice.

    Changes the whole process: call it only where the process is ours (`lmp`, `md-plugin`), never
    in somebody's Python session. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
