"""Cases of the bench below a whole model: the three sums, and one interaction layer.

sums    env, sense and feature sums, (pairs x sensitivities x features); the list is reused, or
        is new at every call: pairs in another order, as LAMMPS hands them over
layer   positions (hippynn: distances) -> env, and dE/denv -> forces and dE/dz (hippynn:
        dE/dr and dE/dz). Dense operations are counted: 2 pairs n_nu n_feat for each of env, w
        and w', which is what hippynn's three sums need as well
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.bench.core import HIPPYNN, OURS, Contest, Options, Provider, present, relative, worst
from md_plugin.bench.systems import (
    CHECKED_ATOMS,
    RCUT_60,
    Problem,
    aluminium,
    kernel_geometry,
    network,
)
from md_plugin.bench.vector import vector_layer
from md_plugin.kernels import get_backend, reference
from md_plugin.pairs import Pairs

N_NU, N_FEAT = 20, 64
SUMS = {
    "envsum": ("sense", "features"),
    "sensesum": ("env", "features"),
    "featsum": ("env", "sense"),
}
BLOCK = 256  # receivers at a time: their env stays in the second-level cache
Sum = Callable[[Tensor, Tensor, Pairs], Tensor]


class SumInputs:
    """Random inputs of the sums on a list, and the same pairs in another order.

    Args:
        n_atoms: wanted atoms.
        seed: of everything random.
    """

    def __init__(self, n_atoms: int, seed: int):
        self.problem = Problem(aluminium(n_atoms, seed), RCUT_60)
        self.pairs, r = self.problem.inside
        self.generator = torch.Generator().manual_seed(seed)
        layer: Any = network().blocks[0][0]  # type: ignore[index]
        with torch.no_grad():
            sense = layer.layer.sensitivity(r.norm(dim=1).float())
        self.arrays = {
            "sense": sense,
            "features": self._normal(self.pairs.n_send, N_FEAT),
            "env": self._normal(self.pairs.n_recv, N_NU, N_FEAT),
        }

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def renew(self) -> None:
        """Other pair arrays: rows are shuffled, so that no key and no content is that of before."""
        old = self.pairs
        key = old.receiver.double() + 0.5 * torch.rand(old.n_pair, generator=self.generator)
        order = key.argsort()
        self.pairs = Pairs(old.row_ptr.clone(), old.sender[order], old.n_send)
        # hippynn takes int64 index arrays; making them is not its cost.
        self.pairs.__dict__["receiver"] = old.receiver.clone()
        self.pairs.__dict__["sender_long"] = old.sender_long[order]
        self.arrays = self.arrays | {"sense": self.arrays["sense"][order]}

    def call(self, name: str, function: Sum) -> Tensor:
        """One sum."""
        first, second = (self.arrays[key] for key in SUMS[name])
        return function(first, second, self.pairs)

    def error(self, name: str, function: Sum) -> float:
        """Of one sum against float64."""
        first, second = (self.arrays[key].double() for key in SUMS[name])
        want = getattr(reference, name)(first, second, self.pairs)
        return relative(self.call(name, function), want)


def sums(options: Options) -> Iterator[Contest]:
    """envsum, sensesum, featsum, and all three: list reused and list new at every call."""
    timed = SumInputs(options.atoms, options.seed)
    small = SumInputs(min(CHECKED_ATOMS, options.atoms), options.seed + 1)
    for names in (*((name,) for name in SUMS), tuple(SUMS)):
        for fresh in (False, True):
            yield _sum_contest(names, timed, small, fresh)


def _sum_contest(
    names: tuple[str, ...], timed: SumInputs, small: SumInputs, fresh: bool
) -> Contest:
    def provider(label: str, side: str, kernels: Any) -> Provider:
        def call() -> None:
            for name in names:
                timed.call(name, getattr(kernels(), name))

        def error() -> float:
            small.renew()
            return worst(*(small.error(name, getattr(kernels(), name)) for name in names))

        return Provider(label, side, call, error, timed.renew if fresh else None)

    providers = [
        provider("ours, numba", OURS, lambda: get_backend("numba").kernels),
        provider("ours, torch reference", OURS, lambda: reference),
        provider("hippynn, numba", HIPPYNN, lambda: _Peer("numba")),
        provider("hippynn, torch", HIPPYNN, lambda: _Peer("_legacy")),
        Provider("hippynn, triton", HIPPYNN, absent="absent: needs a CUDA device"),
    ]
    what = f"{names[0] if len(names) == 1 else 'all three'}, list {'new' if fresh else 'reused'}"
    flop = 2.0 * len(names) * timed.pairs.n_pair * N_NU * N_FEAT
    notes = timed.problem.notes() | {"n_nu": N_NU, "n_feat": N_FEAT}
    n = len(timed.problem.atoms)
    return Contest(what, present(providers), "hippynn, numba", n, flop, notes)


class _Peer:
    """hippynn's three sums of one implementation, on our pairs."""

    def __init__(self, implementation: str):
        from hippynn.custom_kernels.registry import MessagePassingKernels

        self.kernels = MessagePassingKernels.get_implementation(implementation)

    def __getattr__(self, name: str) -> Sum:
        function = getattr(self.kernels, name)
        return lambda a, b, pairs: function(a, b, pairs.receiver, pairs.sender_long)


def layer(options: Options) -> Iterator[Contest]:
    """One interaction layer, forward and backward: scalar, and vector (HIP-NN-TS)."""
    timed = ScalarLayer(options.atoms, options.seed)
    small = ScalarLayer(min(CHECKED_ATOMS, options.atoms), options.seed + 1)
    providers = [
        Provider("ours, fused", OURS, timed.fused, lambda: small.error(small.fused)),
        Provider("ours, closed", OURS, timed.closed, lambda: small.error(small.closed)),
        Provider("hippynn, numba", HIPPYNN, timed.peer, lambda: small.error(small.peer)),
    ]
    flop = 3 * 2.0 * timed.problem.inside[0].n_pair * N_NU * N_FEAT
    notes = timed.problem.notes() | {"n_nu": N_NU, "n_feat": N_FEAT}
    what = "scalar layer, 64 features"
    shape = (len(timed.problem.atoms), flop, notes)
    yield Contest(what, present(providers), "hippynn, numba", *shape)
    yield vector_layer(options)


class ScalarLayer:
    """env, forces and dE/dz of one layer, for random z and dE/denv.

    Args:
        n_atoms: wanted atoms.
        seed: of everything random.
    """

    def __init__(self, n_atoms: int, seed: int):
        from md_plugin.kernels import fused_cpu

        self.problem = Problem(aluminium(n_atoms, seed), RCUT_60)
        generator = torch.Generator().manual_seed(seed)
        n = len(self.problem.atoms)
        # Cache lines: numpy's own arrays make every vector straddle two.
        self.z = fused_cpu.aligned_zeros((n, N_FEAT), np.float32)
        self.ge = fused_cpu.aligned_zeros((n, N_NU, N_FEAT), np.float32)
        self.z[:] = torch.randn(n, N_FEAT, generator=generator).numpy()
        self.ge[:] = torch.randn(n, N_NU, N_FEAT, generator=generator).numpy()
        self.env = fused_cpu.aligned_zeros((BLOCK, N_NU, N_FEAT), np.float32)
        block: Any = network().blocks[0][0]  # type: ignore[index]
        self.sensitivity = block.layer.sensitivity
        self.table = fused_cpu.RadialTable.build(
            self.sensitivity.mu.detach().double().numpy(),
            self.sensitivity.sigma.detach().double().numpy(),
            RCUT_60,
        )
        self.theirs: Any = None
        self.r = self.problem.inside[1].norm(dim=1)

    def fused(self, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """env (n, n_nu, n_feat) where it is kept, forces (n, 3), dE/dz (n, n_feat)."""
        from md_plugin.kernels import fused_cpu

        where = kernel_geometry(self.problem.geometry)
        n_thread = torch.get_num_threads()
        sums = fused_cpu.Gradients(len(self.z), N_FEAT, np.float32, n_thread)
        kept = []
        for begin in range(0, len(self.z), BLOCK):
            env = self.env[: len(self.z) - begin]
            if keep:
                env[:] = np.nan
            fused_cpu.forward(where, self.table, self.z, env, begin, n_thread)
            if keep:
                kept.append(torch.from_numpy(env.copy()))
            ge = self.ge[begin : begin + BLOCK]
            fused_cpu.backward(where, self.table, self.z, ge, sums, begin)
        forces, gz, _ = sums.total()
        whole = torch.cat(kept) if keep else torch.empty(0)
        return whole, torch.from_numpy(forces), torch.from_numpy(gz)

    def closed(self, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The same from distances, by the sums that can be differentiated again."""
        backend = get_backend("numba")
        return self._by_autograd(lambda s, z: backend.envsum(s, z, self.problem.inside[0]), keep)

    def peer(self, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The same from distances, by hippynn."""
        from hippynn import custom_kernels
        from hippynn.layers.hiplayers import InverseSensitivityModule

        if self.theirs is None:
            self.theirs = InverseSensitivityModule(N_NU, 1.25, 5.5, RCUT_60)
            self.theirs.mu.data[:] = self.sensitivity.mu.data
            self.theirs.sigma.data[:] = self.sensitivity.sigma.data
        pairs = self.problem.inside[0]

        def envsum(sense: Tensor, z: Tensor) -> Tensor:
            env: Tensor = custom_kernels.envsum(sense, z, pairs.receiver, pairs.sender_long)
            return env

        return self._by_autograd(envsum, keep, self.theirs)

    def _by_autograd(
        self, envsum: Any, keep: bool, sensitivity: Any = None, dtype: Any = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        # detach: `to` may give the very tensor
        given = self.r, torch.from_numpy(self.z)
        r, z = (x.to(dtype).detach().requires_grad_() for x in given)
        env = envsum((sensitivity or self.sensitivity)(r), z)
        ge = torch.from_numpy(self.ge).to(dtype)
        gr, gz = torch.autograd.grad(env, (r, z), ge)
        if not keep:
            return env, gr, gz
        vectors = self.problem.inside[1]
        forces = self.problem.sum_forces(gr.double()[:, None] * vectors / self.r[:, None])
        return env.detach(), forces, gz

    def error(self, function: Any) -> float:
        """Largest of the errors of env, forces and dE/dz against float64."""
        pairs, sensitivity = self.problem.inside[0], network().double().blocks[0][0].layer  # type: ignore
        want = self._by_autograd(
            lambda s, z: reference.envsum(s, z, pairs),
            True,
            sensitivity.sensitivity,  # type: ignore[union-attr]
            torch.float64,
        )
        return worst(*map(relative, function(keep=True), want))
