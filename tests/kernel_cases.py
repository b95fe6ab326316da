"""What the kernel tests share: the shapes, brute force in float64, the comparison, the backends."""

import contextlib
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product

import cuda_emulation
import numpy as np
import pytest
import torch

from md_plugin.kernels import get_backend, list_backends
from md_plugin.pairs import Pairs

OPS = ("envsum", "sensesum", "featsum")
DTYPES = (torch.float32, torch.float64)
ARGUMENTS = {
    "envsum": ("sense", "features"),
    "sensesum": ("env", "features"),
    "featsum": ("env", "sense"),
}
# "numba" takes one form of featsum or the other by its number of threads, "triton" by whether torch
# is asked for deterministic algorithms: all are tested. "cupy" runs on the CPU as well, emulated.
EMULATED = "cupy: emulated"
VARIANTS = {
    "numba": ("numba", "numba: 3 buffers", "numba: gather"),
    "triton": ("triton", "triton: by sender"),
    "cupy": ("cupy", EMULATED),
}
NAMES = [*list_backends(), EMULATED]
BACKENDS = [variant for name in list_backends() for variant in VARIANTS.get(name, (name,))]


@dataclass(frozen=True)
class Case:
    """An edge list in any order, and the widths of what lives on it."""

    receiver: list[int]
    sender: list[int]
    n_recv: int
    n_send: int
    n_nu: int
    n_feat: int

    def pairs(self):
        """CSR pairs and the permutation that sorts per-pair data."""
        receiver, sender = torch.tensor(self.receiver), torch.tensor(self.sender)
        return Pairs.from_edges(receiver, sender, self.n_recv, self.n_send)

    def arrays(self, dtype, seed=0):
        """Random {"sense", "features", "env"}; sense in the order of the edge list."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "sense": (len(self.receiver), self.n_nu),
            "features": (self.n_send, self.n_feat),
            "env": (self.n_recv, self.n_nu, self.n_feat),
        }
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype)
            for name, shape in shapes.items()
        }


def _random(n_recv, n_send, n_pair, n_nu, n_feat, rows=None):
    rng = np.random.default_rng(7)
    receiver = rng.choice(np.arange(n_recv) if rows is None else rows, n_pair)
    sender = rng.integers(n_send, size=n_pair)
    return Case(receiver.tolist(), sender.tolist(), n_recv, n_send, n_nu, n_feat)


CASES = {
    "no atoms": Case([], [], 0, 0, 3, 5),
    "no receivers": Case([], [], 0, 4, 3, 5),
    "no pairs": Case([], [], 3, 5, 2, 3),
    "no features": Case([0, 1], [1, 0], 2, 2, 3, 0),
    "no sensitivities": Case([0, 1], [1, 0], 2, 2, 0, 3),
    "one atom": Case([], [], 1, 1, 4, 3),
    "one atom and its images": Case([0] * 6, [0] * 6, 1, 1, 4, 3),
    "one of everything": Case([0], [0], 1, 1, 1, 1),
    "same pair many times": Case([1] * 5, [2] * 5, 2, 3, 3, 4),
    "empty rows": _random(7, 7, 12, 3, 5, rows=[1, 2, 5]),
    "ghosts": _random(3, 11, 20, 5, 8),
    "unsorted, odd": _random(9, 9, 40, 7, 41),
    # More than one block of pairs, sensitivities and features, none of them full.
    "beyond every block": _random(2, 3, 70, 70, 130),
    "large": _random(20, 30, 400, 20, 64),
}


def brute_force(op, case, first, second):
    """The sum over the unsorted edge list in numpy float64, one pair after the other."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    shape = {
        "envsum": (case.n_recv, case.n_nu, case.n_feat),
        "sensesum": (len(case.receiver), case.n_nu),
        "featsum": (case.n_send, case.n_feat),
    }[op]
    out = np.zeros(shape)
    for p, (i, j) in enumerate(zip(case.receiver, case.sender, strict=True)):
        if op == "envsum":
            out[i] += np.outer(a[p], b[j])
        elif op == "sensesum":
            out[p] = a[i] @ b[j]
        else:
            out[j] += b[p] @ a[i]
    return out


# Triton's float32 product of two numbers is off by 3 2^-22 of it at most: see `triton_gpu`.
SPLIT = {"triton": 6, "triton: by sender": 6}


def expected(op, case, first, second, more=0):
    """The sum and its tolerance per element; `more` roundings of each product than one.

    A sum of n products in any order is off by at most n eps/2 sum |terms| (Higham, Accuracy and
    Stability of Numerical Algorithms, eq. 3.5); brute force in float64 by as much again. n and
    sum |terms| are what the same sum gives for ones and for absolute values.
    """
    eps = torch.finfo(first.dtype).eps
    n_terms = brute_force(op, case, torch.ones_like(first), torch.ones_like(second))
    magnitude = brute_force(op, case, first.abs(), second.abs())
    return brute_force(op, case, first, second), (n_terms + more) * eps * magnitude


def assert_sum(got, want, tolerance, dtype):
    """The one comparison of the matrix; NaN, a wrong shape or dtype fail as well."""
    assert got.dtype == dtype
    assert tuple(got.shape) == want.shape
    error = np.abs(got.detach().cpu().numpy().astype(np.float64) - want)
    assert np.all(error <= tolerance), f"largest error {error.max()}, allowed {tolerance.max()}"


def run_sum(op, sums, case, arrays, device="cpu"):
    """One sum of a Backend or of raw SumKernels; its result in the order of the edge list."""
    pairs, perm = case.pairs()
    inputs = (
        (arrays[name][perm] if name == "sense" else arrays[name]).to(device)
        for name in ARGUMENTS[op]
    )
    out = getattr(sums, op)(*inputs, pairs.to(device))
    if op != "sensesum":
        return out
    in_edge_order = torch.empty_like(out)
    in_edge_order[perm.to(device)] = out
    return in_edge_order


def absence(variant, device="cpu"):
    """Why a backend cannot be tested on a device here; "" where it can."""
    if variant == EMULATED:
        fault = cuda_emulation.ABSENT or ("it is for CPUs" if device != "cpu" else "")
        return fault and f"{variant}: {fault}"
    name = variant.partition(": ")[0]
    reason = list_backends()[name] or _interpreter_fault(name)
    if reason:
        return f"{name}: {reason}"
    devices = get_backend(name).devices
    if device not in devices:
        return f"{name} computes on {' and '.join(devices)}, not on {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"{name} on cuda: no CUDA device was found"
    return ""


def backend_parameters(names=BACKENDS):
    """One parameter per backend; absent ones carry the skip and its reason."""
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name in names
        for reason in [absence(name)]
    ]


def matrix_parameters():
    """(op, backend, device, dtype, shape); one skip per backend and device that is absent."""
    found = []
    for variant, device in product(BACKENDS, ("cpu", "cuda")):
        reason = absence(variant, device)
        if reason:
            skip = pytest.mark.skip(reason=reason)
            found.append(pytest.param("", variant, device, None, "", marks=skip, id=reason))
            continue
        ops = ("featsum",) if variant == "triton: by sender" else OPS  # the others are the same
        for op, dtype, shape in product(ops, DTYPES, CASES):
            name = f"{op}-{variant}-{device}-{str(dtype)[6:]}-{shape}"
            found.append(pytest.param(op, variant, device, dtype, shape, id=name))
    return found


def use_variant(variant, monkeypatch):
    """The backend of that name, in that form."""
    if variant == EMULATED:
        cuda_emulation.register(monkeypatch)
        return get_backend("cupy")
    name, _, form = variant.partition(": ")
    if name == "triton":
        from md_plugin.kernels import triton_gpu

        monkeypatch.setattr(triton_gpu, "fixed_order", lambda: form == "by sender")
    elif form:
        from md_plugin.kernels import numba_cpu

        n_thread = 3 if form == "3 buffers" else numba_cpu.MAX_BUFFERS + 1
        monkeypatch.setattr(numba_cpu.numba, "get_num_threads", lambda: n_thread)
    return get_backend(name)


def _interpreter_fault(name):
    if name != "triton" or torch.cuda.is_available():
        return ""
    numpy_minor = tuple(int(part) for part in np.__version__.split(".")[:2])
    if version("triton").startswith("3.6.") and numpy_minor >= (2, 4):
        return "the interpreter of triton 3.6 does not work with numpy 2.4 or newer"
    return ""


@contextlib.contextmanager
def poisoned_memory():
    """Every torch.empty is full of NaN, so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills: torch.utils.deterministic
    try:
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
