"""What a CUDA graph does, on the CPU: operators and launches on fixed memory, nothing of Python.

A capture only learns what to do: afterwards its results are poisoned, and launches have not run. A
replay runs each operator again on the same tensors and writes results where they stood. Numbers of
Python that went into operators are frozen in them, as in a real graph.
"""

import contextlib
from importlib import import_module

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from md_plugin.kernels.triton_arrays import halves
from md_plugin.model.radial import tensor_components

# In md_plugin.kernels: room, name there, and name here and in `TapeRecorder.launches`.
LAUNCHES = [("triton_fused", name, name) for name in ("forward", "backward")]
LAUNCHES += [("triton_halves", name, name) for name in ("split", "split_rows")]
LAUNCHES += [("triton_matmul", "product", "product")]
LAUNCHES += [("triton_atom_layers", name, name + "_atoms") for name in ("forward", "backward")]


def _rcut(radial):
    """Where pairs of these tests end, and the cutoff: on the device, or not."""
    return float(radial.limits[0]) if hasattr(radial, "limits") else radial.rcut


def _rows(where, radial, z, shape, begin, d=None):
    """Pairs (i, j, d) of receivers of a block, and rows t_c s_nu z_a of each pair."""
    row_ptr = where.row_ptr[begin : begin + shape[0] + 1].long()
    p = torch.arange(int(row_ptr[0]), int(row_ptr[-1]))
    i = torch.arange(shape[0]).repeat_interleave(row_ptr.diff())
    j = where.sender[p].long()
    if d is None:
        shift = 0.0
        if where.translation is not None:
            shift = where.translations[where.translation[p].long()]
        d = where.x[j] - where.x[begin + i] + shift
        near = torch.linalg.vector_norm(d, dim=1) < _rcut(radial)
        i, j, d = i[near], j[near], d[near].requires_grad_()
    r = torch.linalg.vector_norm(d, dim=1)[:, None]
    s = torch.exp2(-((radial.table[0] / r - radial.table[1]).square()))
    s = s * torch.cos(0.5 * torch.pi * r / _rcut(radial)).square()
    t = tensor_components(d / r, {1: 0, 4: 1, 9: 2}[shape[1]])
    sent = torch.eye(shape[3])[where.species.long()].to(s) if z is None else z
    return i, j, d, t[:, :, None, None] * s[:, None, :, None] * sent[j][:, None, None]


def _sum(array):
    """Of halves; float64 as it is."""
    return array.float().sum(dim=0) if array.dtype == torch.float16 else array


def forward(where, radial, z, env, begin=0):
    """What `triton_fused.forward` writes, in a moment, for networks whose pairs end at rcut."""
    with torch.enable_grad():
        leaf = None if z is None else _sum(z)
        i, _, _, rows = _rows(where, radial, leaf, env.shape[-4:], begin)
    total = torch.zeros(env.shape[-4:], dtype=rows.dtype).index_add_(0, i, rows.detach())
    if env.dtype == torch.float16:
        total = halves(total, len(env))
    env.copy_(total)


def backward(where, radial, z, ge, gradients, begin=0, scale=None):
    """What `triton_fused.backward` adds."""
    ge = _sum(ge)
    of_message, of_force = torch.ones(2, len(ge)) if scale is None else scale
    with torch.enable_grad():
        leaf = None if z is None else _sum(z).detach().requires_grad_()
        i, j, d, rows = _rows(where, radial, leaf, ge.shape, begin)
        wanted = [d] if z is None else [d, leaf]
        total = (rows * ge[i]).flatten(1).sum(dim=1)
        g, *of_z = map(torch.zeros_like, wanted)
        if len(i):
            (g,) = torch.autograd.grad(total, d, of_force[i].to(total), retain_graph=True)
        if len(i) and of_z:
            of_z = torch.autograd.grad(total, leaf, of_message[i].to(total))
    d, i = d.detach(), begin + i
    gradients.forces.index_add_(0, i, g).index_add_(0, j, -g)
    gradients.sums[:, :9].index_add_(0, i, -(d[:, :, None] * g[:, None]).flatten(1))
    r = torch.linalg.vector_norm(d, dim=1)
    gradients.sums[:, -1].scatter_reduce_(0, i, r, "amin")
    if of_z:
        gradients.messages.add_(of_z[0])


def _power(largest):
    """The power of two above it, 1 where it is 0."""
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def split(x, found, power):
    """What `triton_halves.split` writes."""
    power.copy_(_power(x.abs().amax()) if x.numel() else torch.ones(()))
    found.copy_(halves(x / power, len(found)))


def split_rows(x, found, scale, first, second):
    """What `triton_halves.split_rows` writes."""
    power = _power(x.flatten(1).abs().amax(dim=1))
    found.copy_(halves(x / power.view(-1, *[1] * (x.ndim - 1)), len(found)))
    scale.copy_(torch.stack([power * first, power * first * second]))


def product(a, b, out, counters, powers=None):
    """What `triton_matmul.product` writes."""
    found = a.float().sum(dim=0) @ b.float().sum(dim=0)
    if powers is not None:
        found *= powers[0] * powers[1]
    out.copy_(halves(found, len(out)) if out.dtype == torch.float16 else found)


def _atoms(shape, weights, m, z):
    """Features and energies of a block, from padded weights, by torch."""
    _, n_in, n_hidden, n_out = shape

    def row(numbers, layer):
        return numbers[layer, :n_hidden] if numbers is weights.bias else numbers[layer, :n_out]

    cusp, scales = weights.scales[0], weights.scales[1:].view(-1, weights.bias.shape[1])
    h = m[:, 0]
    for scale, norm in zip(scales[:, :n_hidden], _squares(m), strict=False):
        h = h + scale * torch.sqrt(norm + cusp)
    sent = torch.eye(n_in).to(m)[z.long()] if z.ndim == 1 else z
    # Of species a row of the table each, after one of none; of features a column.
    first, adjust = (w if w is None or z.ndim == 2 else w[1:].T for w in weights[:2])
    h = h + sent @ first[:n_hidden, :n_in].T + row(weights.bias, 0)
    x = sent if adjust is None else sent @ adjust[:n_out, :n_in].T
    for layer in range(len(weights.bias)):
        if layer:
            h = x @ weights.inward[layer - 1, :n_hidden, :n_out].T + row(weights.bias, layer)
        value = torch.nn.functional.softplus(h)
        if weights.outward is None:
            x = value
        else:
            x = x + value @ weights.outward[layer, :n_out, :n_hidden].T + row(weights.shift, layer)
    return x, x @ weights.readout[:n_out] + weights.readout[-1]


def _squares(m):
    """|v|^2 and Q:Q of vectors and quadrupoles."""
    q = m[:, 4:9]
    yield m[:, 1:4].square().sum(dim=1)
    yield 2.0 * (q.square().sum(dim=1) + q[:, 0] * q[:, 3]) if q.shape[1] else None


def forward_atoms(shape, weights, m, z, out, energy):
    """What `triton_atom_layers.forward` writes, in a moment."""
    x, e = _atoms(shape, weights, m, z)
    out.copy_(x)
    energy.add_(e)


def backward_atoms(shape, weights, m, z, gradient, gm, along=None, energy=None):
    """What `triton_atom_layers.backward` writes."""
    with torch.enable_grad():
        m, z = m.detach().requires_grad_(), z.detach()
        z.requires_grad_(z.ndim == 2)
        x, e = _atoms(shape, weights, m, z)
        total = e.sum() if gradient is None else e.sum() + (x * gradient).sum()
        wanted = [(m, gm)] if along is None else [(m, gm), (z, along)]
        found = torch.autograd.grad(total, [leaf for leaf, _ in wanted])
    for (_, target), g in zip(wanted, found, strict=True):
        target.copy_(g)
    if energy is not None:
        energy.add_(e.detach())


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for memory in map(torch.Tensor.untyped_storage, tensors((args, kwargs))):
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        result = func(*args, **kwargs)
        if not func.is_view:
            self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self):
        """Nothing has happened yet: memory is as before, and new memory holds anything."""
        for memory, saved in self.before.values():
            memory.copy_(saved)
        for func, _, _, result in self.calls:
            for x in tensors(result):
                if x.is_floating_point() and not func._schema.is_mutable:
                    x.fill_(torch.nan)

    @torch.no_grad()
    def play(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class TapeRecorder:
    """A `Recorder`. Counts warm-ups, captures and replays.

    Args:
        monkeypatch: to get hold of the launches.
        interpreted: whether they run the interpreted kernels; else the functions above, a hundred
            times as fast.
    """

    def __init__(self, monkeypatch, interpreted=False):
        self.warm_ups = self.captures = self.replays = 0
        self.tape, self.launches = None, []
        for room, name, here in LAUNCHES:
            module = import_module(f"md_plugin.kernels.{room}")
            launch = getattr(module, name) if interpreted else globals()[here]
            monkeypatch.setattr(module, name, self._launcher(here, launch))

    def _launcher(self, name, launch):

        def wrapped(*args, **kwargs):
            self.launches.append((name, args))
            if self.tape is not None:
                self.tape.calls.append((launch, args, kwargs, None))
                return
            with _disable_current_modes():  # the interpreter is no part of the step
                launch(*args, **kwargs)

        return wrapped

    def warm_up(self, call):
        self.warm_ups += 1
        return call()

    def capture(self, call):
        self.captures += 1
        self.tape = tape = Tape()
        try:
            with tape:
                result = call()
        finally:
            self.tape = None
        tape.undo()

        def play():
            self.replays += 1
            tape.play()

        return play, result


@contextlib.contextmanager
def launch_counts(monkeypatch, interpreted=False):
    """A block of code in which modes do not see what launches do; the launches."""
    with monkeypatch.context() as patch:
        yield TapeRecorder(patch, interpreted).launches
