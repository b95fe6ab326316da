"""The sums over neighbours of one interaction layer, fused, and their gradients, on a GPU.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]        m = env V

env comes first in every order (see `md_plugin.kernels.triton_fused`), for as many atoms at once as
its product with V, in float32 of halves (`md_plugin.kernels.triton_matmul`), takes to fill the GPU.
Sensitivities that are mixed from Gaussians: as in `md_plugin.model.fused_sums`. Where Triton
interprets its kernels, they run on the CPU as well, for tests.

With `torch.use_deterministic_algorithms`, and without ghosts, no sum depends on the order in which
programs run: each atom takes from its own row both what it gets and what it gives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import triton_arrays, triton_fused, triton_halves, triton_matmul, tuning
from md_plugin.kernels.triton_parts import fixed_order, multiprocessors
from md_plugin.model.device_atoms import atom_layers
from md_plugin.model.fused_check import mirror_check, self_check
from md_plugin.model.fused_sums import Sums, gaussian_weight
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.radial import N_COMPONENTS
from md_plugin.pairs import Geometry

# env, or dE/denv, of a block of atoms, at most: docs/gpu.md has the reasons.
BLOCK_BYTES = 180_000_000


class DeviceEngine:
    """Kernels in Triton.

    Args:
        model: the network.
        fast: products of sums in float16; see `HalfSums`.
    """

    threads, max_block = False, 1 << 18

    def __init__(self, model: Hipnn, fast: bool = False):
        self.fast, self.order = fast, model.config.order
        self_check(model.encoder.device, model.encoder.dtype, self.order, fast)
        if fixed_order():  # here, since the host waits: a step in which it does is not recorded
            mirror_check(model.encoder.device, model.encoder.dtype, self.order)

    def where(self, species: Tensor, geometry: Geometry) -> Any:
        """See `fused_sums.Engine`."""
        g = geometry
        x, rows = g.x.double().contiguous(), (g.pairs.row_ptr, g.pairs.sender)
        if g.translation is None or g.translations is None:
            return triton_arrays.Geometry(x, *rows, species=species)
        images = g.translation, g.translations.double().contiguous()
        return triton_arrays.Geometry(x, *rows, *images, species)

    def gradients(self, where: Any, dtype: torch.dtype, n_thread: int, split: str) -> Any:
        """See `fused_sums.Engine`.

        Raises:
            RuntimeError: torch is told to be deterministic, and atomics are needed.
        """
        per_atom = split == "atoms"
        own_rows = _deterministic(where, self.fast, per_atom)
        if own_rows:
            mirror_check(where.x.device, dtype, self.order)
        return triton_arrays.Gradients(where, 0, dtype, own_rows, per_atom=per_atom)

    def results(self, found: Any, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `fused_sums.Engine`. Rows of receivers are there in any case."""
        halves = {"": None, "structures": found.row_virials, "atoms": found.atom_virials}
        return found.forces, found.virial, found.closest, halves[split]

    def sums(self, interaction: Any, is_first: bool) -> Sums:
        """See `fused_sums.Engine`."""
        if interaction.weight.dtype == torch.float64:
            return DeviceSums(interaction, is_first)
        return HalfSums(interaction, is_first, 1 if self.fast and not is_first else 2)

    def atoms(self, model: Hipnn, number: int) -> Any:
        """See `fused_sums.Engine`."""
        return atom_layers(model, number)


def _deterministic(where: Any, fast: bool, per_atom: bool) -> bool:
    """Whether torch is told to give the same result every time, and it can be given."""
    if not fixed_order():
        return False
    n_ghost = len(where.x) + 1 - len(where.row_ptr)
    reasons = [f"forces of {n_ghost} ghosts"] if n_ghost else []
    reasons += ["forces in dtype='fast'"] if fast else []
    reasons += ["virials of atoms"] if per_atom else []
    if not reasons:
        return True
    remedy = "dtype='mixed'" if reasons == ["forces in dtype='fast'"] else "backend='torch'"
    message = (
        f"torch.use_deterministic_algorithms is on, but {', '.join(reasons)} are added by atomics, "
        f"in an order that changes from run to run; turn it off, or choose {remedy}"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
    return False


@dataclass(eq=False)
class _Sink:
    """What one layer adds to; what its mirror pass needs where every atom keeps to its own row."""

    found: triton_arrays.Gradients
    of_sums: Tensor | None = None  # dE/dm of all receivers
    where: Any = None
    source: Any = None

    def part(self, t: int) -> _Sink:
        """Itself: programs share everything."""
        return self


class DeviceSums:
    """Layers of any tensor order, in float64; see `fused_sums.Sums`."""

    def __init__(self, interaction: Any, is_first: bool):
        s = interaction.sensitivity
        self.is_first = is_first
        self.radial = triton_arrays.Radial.build(s.mu, s.sigma, s.rcut, s.end)
        weight = gaussian_weight(interaction)
        self.n_nu, self.n_in, n_hidden = weight.shape
        self.weight = weight.reshape(-1, n_hidden).contiguous()
        self.shape = (N_COMPONENTS[interaction.order], n_hidden)
        self.n_byte = weight.element_size()  # of a number of env

    @property
    def block(self) -> int:
        """Receivers at once: as many as was measured best, else whole turns of the GPU, if any."""
        device = self.weight.device
        return tuning.known(self.block_key, device).get("receivers") or self.receivers(BLOCK_BYTES)

    def receivers(self, n_byte: int) -> int:
        """As many as fit: whole turns of the GPU with tiles of 128 rows, if any.

        Multiples of 16 are all the same to Triton's compiler.
        """
        n_comp = self.shape[0]
        most = n_byte // (n_comp * len(self.weight) * self.n_byte)
        turn = 128 * multiprocessors(self.weight.device)
        n_turn = most * n_comp // turn
        return (n_turn * turn // n_comp if n_turn else most) // 16 * 16

    @property
    def block_key(self) -> str:
        """Its name in `tuning`."""
        grade = {2: torch.float16, 4: torch.float32, 8: torch.float64}[self.n_byte]
        return tuning.key("block", (1, self.shape[0], self.n_nu, self.n_in), grade)

    def source(self, z: Tensor, n_thread: int) -> Any:
        """See `fused_sums.Sums`."""
        return None if self.is_first else z

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """See `fused_sums.Sums`."""
        env = m.new_empty(len(m), self.shape[0], self.n_nu, self.n_in)
        triton_fused.forward(where, self.radial, source, env, start)
        torch.mm(env.reshape(-1, len(self.weight)), self.weight, out=m.view(-1, self.shape[1]))

    def sink(self, found: Any) -> Any:
        """See `fused_sums.Sums`."""
        sink = _Sink(found.for_layer(0 if self.is_first else self.n_in))
        if found.own_rows:
            sink.of_sums = sink.found.messages.new_empty(len(found.sums), *self.shape)
        return sink

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """See `fused_sums.Sums`."""
        ge = g.reshape(-1, self.shape[1]) @ self.weight.T
        ge = ge.reshape(len(g), self.shape[0], self.n_nu, self.n_in)
        triton_fused.backward(where, self.radial, source, ge, sink.found, start)
        self._keep(where, source, g, sink, start)

    def _keep(self, where: Any, z: Tensor | None, g: Tensor, sink: _Sink, start: int) -> None:
        """What the mirror pass needs, if there is one."""
        if sink.of_sums is not None:
            sink.of_sums[start : start + len(g)] = g
            sink.where, sink.source = where, z

    def sent(self, sink: Any) -> Tensor:
        """See `fused_sums.Sums`."""
        if sink.where is not None:
            self._mirror(sink)
        messages: Tensor = sink.found.messages
        return messages

    def _mirror(self, sink: _Sink) -> None:
        """Adds what pairs of other receivers give; see `md_plugin.kernels.triton_mirror`."""
        assert sink.of_sums is not None
        weight = self.weight.view(self.n_nu, self.n_in, self.shape[1])
        by_feature = weight.transpose(0, 1).reshape(self.n_in, -1)
        by_hidden = weight.transpose(1, 2).reshape(-1, self.n_in)
        block = self.block
        for start in range(0, len(sink.of_sums), block):
            rows = slice(start, min(start + block, len(sink.of_sums)))
            if self.is_first:
                q, h = by_feature[sink.where.species[rows].long()], None
            else:
                q = sink.source[rows] @ by_feature
                h = torch.empty_like(q).view(-1, self.n_nu, self.shape[1])
            q = q.view(-1, self.n_nu, self.shape[1])
            triton_fused.mirror(
                sink.where, self.radial, sink.of_sums, q, h, sink.found, begin=start
            )
            if h is not None:
                torch.mm(h.view(len(h), -1), by_hidden, out=sink.found.messages[rows])


class HalfSums(DeviceSums):
    """The same in float32: sums over neighbours, and products with V, of float16 numbers.

    Arrays are halves (see `triton_fused`): two, which are as good as float32, or one, for
    dtype="fast". A power of two takes each to at most 1: one for V, one for z, one for dE/dm of
    each receiver, all found on the device. So env is at most the number of neighbours, dE/denv at
    most n_hidden, and what is lost to float16's least number is below 2^-24 of the largest.

    Args:
        interaction: the layer.
        is_first: whether features are one-hot.
        n_half: 2 or 1.
    """

    def __init__(self, interaction: Any, is_first: bool, n_half: int):
        super().__init__(interaction, is_first)
        self.n_half, weight = n_half, self.weight
        self.one, self.of_weight = weight.new_ones(()), weight.new_empty(())
        self.halves = weight.new_empty(n_half, *weight.shape, dtype=torch.float16)
        triton_halves.split(weight, self.halves, self.of_weight)
        self.turned = self.halves.mT.contiguous()
        self.counters = triton_matmul.counters(weight.device)
        self.n_byte = 2 * n_half

    def source(self, z: Tensor, n_thread: int) -> Any:
        """See `fused_sums.Sums`: features, their halves and power; none of one-hot features."""
        if self.is_first:
            return None, None, self.one
        halves = z.new_empty(self.n_half, *z.shape, dtype=torch.float16)
        power = z.new_empty(())
        triton_halves.split(z, halves, power)
        return z, halves, power

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """See `fused_sums.Sums`."""
        _, z, power = source
        env = self._env(len(m))
        triton_fused.forward(where, self.radial, z, env, start)
        rows = env.view(self.n_half, -1, len(self.weight)), self.halves, m.view(-1, self.shape[1])
        triton_matmul.product(*rows, self.counters, (power, self.of_weight))

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """See `fused_sums.Sums`."""
        z, halves, power = source
        small = g.new_empty(self.n_half, *g.shape, dtype=torch.float16)
        scale = g.new_empty(2, len(g))
        triton_halves.split_rows(g.contiguous(), small, scale, self.of_weight, power)
        ge, rows = self._env(len(g)), small.view(self.n_half, -1, self.shape[1])
        out = ge.view(self.n_half, -1, len(self.weight))
        triton_matmul.product(rows, self.turned, out, self.counters)
        triton_fused.backward(where, self.radial, halves, ge, sink.found, start, scale=scale)
        self._keep(where, z, g, sink, start)

    def _env(self, n_block: int) -> Tensor:
        """Halves of an array of a block."""
        shape = self.n_half, n_block, self.shape[0], self.n_nu, self.n_in
        return self.weight.new_empty(shape, dtype=torch.float16)
