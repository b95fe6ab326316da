"""What a fused step on a GPU asks for: launches, bytes, memory; none of it grows with the pairs.

Counted with kernels that do nothing, at the shapes of real models; docs/gpu.md has the table.
"""

from importlib import import_module
from itertools import accumulate

import pytest
import torch
from graph_recorder import LAUNCHES
from kernel_cases import absence
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md_plugin.model.atom_layers import _norms
from md_plugin.model.config import HipnnConfig
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import Hipnn
from md_plugin.pairs import Geometry, Pairs

pytestmark = pytest.mark.skipif(bool(absence("triton")), reason=absence("triton") or "there")

N_ATOMS = 64
METALS, ORGANIC = (13,), (1, 6, 7, 8)
# 20 sensitivities, 3 atom layers; of one step: kernels of ours, other operators that launch one, kB
# per atom in and out of all but sums over pairs, and kB per atom of the peak of memory beyond
# input and workspace. hippynn 0.1.3 with its Triton kernels: 124 and 217 kB for the first, 287 and
# 1,040 kB for "vector, 2 layers", beside what its kernels move and keep per pair.
BUDGET = {
    "scalar, 1 layer": ({"n_feat": 64, "species": METALS}, 6, 6, 2.1, 0.13),
    "scalar, 2 layers": ({"n_feat": 64, "species": METALS}, 15, 8, 17, 1.6),
    "vector, 1 layer": ({"n_feat": 128, "species": ORGANIC, "order": 1}, 6, 6, 16, 0.16),
    "vector, 2 layers": ({"n_feat": 128, "species": ORGANIC, "order": 1}, 15, 8, 120, 4.3),
    "quadrupole, 1 layer": ({"n_feat": 128, "species": ORGANIC, "order": 2}, 6, 6, 35, 0.16),
    "quadrupole, 2 layers": ({"n_feat": 128, "species": ORGANIC, "order": 2}, 15, 8, 260, 6.9),
}


class Traffic(TorchDispatchMode):
    """Operators that launch something, and bytes of their arguments and results."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = func.__name__.split(".")[0] in ("empty", "empty_like", "new_empty")
        if not (func.is_view or made) and sum(x.numel() for x in tensors(result)):
            self.operators += 1
            self.bytes += moved((args, kwargs, result))
        return result


def moved(tree):
    """Bytes of the arrays that a launch is given."""
    return sum({(x.data_ptr(), x.shape): x.nbytes for x in tensors(tree)}.values())


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def place(n_atoms, per_atom):
    receiver = torch.arange(n_atoms).repeat_interleave(per_atom)
    sender = (receiver + 1 + torch.arange(len(receiver)) % per_atom) % n_atoms
    pairs, _ = Pairs.from_edges(receiver, sender, n_atoms, n_atoms)
    return Geometry(torch.zeros(n_atoms, 3, dtype=torch.float64), pairs)


def idle(monkeypatch, launches):
    """Kernels that do nothing, and are listed: name, and bytes of all but the sums over pairs."""

    def stub(name, room):
        def launch(*args, **kwargs):
            launches.append((name, 0 if room == "triton_fused" else moved((args, kwargs))))

        return launch

    for room, name, _ in LAUNCHES:
        module = import_module(f"md_plugin.kernels.{room}")
        monkeypatch.setattr(module, name, stub(name, room))


@pytest.mark.parametrize("name", BUDGET)
def test_launches_and_bytes_of_a_step(name, monkeypatch):
    changes, kernels, operators, kilobytes, _ = BUDGET[name]
    config = HipnnConfig(n_interactions=int(name.split()[1]), **changes)
    step, launches = FusedHipnn(Hipnn(config, backend="triton"), "triton"), []
    idle(monkeypatch, launches)
    counted = []
    for n_atoms, n_pair in ((N_ATOMS, 2), (N_ATOMS, 40), (2 * N_ATOMS, 2)):
        launches.clear()
        species, geometry = torch.full((n_atoms,), config.species[0]), place(n_atoms, n_pair)
        with torch.no_grad(), Traffic() as traffic:
            step.evaluate(species, geometry)
        launched = sum(2 if name == "split" else 1 for name, _ in launches)
        n_byte = traffic.bytes + sum(n_byte for _, n_byte in launches)
        counted.append((launched, traffic.operators, n_byte))
    assert counted[0] == counted[1], "something grows with the number of pairs"
    assert counted[0][:2] == counted[2][:2]
    per_atom = (counted[2][2] - counted[0][2]) / N_ATOMS / 1000  # weights drop out
    assert counted[0][0] == kernels and counted[0][1] <= operators, counted
    assert per_atom <= kilobytes, f"{per_atom:.1f} kB per atom"


@pytest.mark.parametrize("name", BUDGET)
def test_memory_of_a_step(name, monkeypatch):
    """Per atom, where blocks of atoms have one size; what a block takes is the workspace."""
    from md_plugin.model import device_atoms, fused_device

    monkeypatch.setattr(fused_device, "BLOCK_BYTES", 1)
    monkeypatch.setattr(device_atoms.DeviceAtomLayers, "workspace", 1)
    changes, *_, kept = BUDGET[name]
    config = HipnnConfig(n_interactions=int(name.split()[1]), **changes)
    step = FusedHipnn(Hipnn(config, backend="triton"), "triton")
    assert {layer.max_block for layer in step.layers} == {N_ATOMS}
    idle(monkeypatch, [])
    peaks = []
    for n_atoms in (4 * N_ATOMS, 8 * N_ATOMS):
        species, geometry = torch.full((n_atoms,), config.species[0]), place(n_atoms, 2)
        peaks.append(peak(lambda at=(species, geometry): step.evaluate(*at)))
    per_atom = (peaks[1] - peaks[0]) / (4 * N_ATOMS) / 1000
    assert 0.5 * kept < per_atom <= kept, f"{per_atom:.2f} kB per atom"


@pytest.mark.parametrize("name", BUDGET)
def test_blocks_fill_the_gpu(name):
    """Each of 132 multiprocessors has as many tiles of 128 rows of the product with V as any."""
    changes, *_ = BUDGET[name]
    config = HipnnConfig(n_interactions=int(name.split()[1]), **changes)
    for layer in FusedHipnn(Hipnn(config, backend="triton"), "triton").layers:
        n_comp, of_env = layer.sums.shape[0], 4 * len(layer.sums.weight)
        assert -(-layer.sums.block * n_comp // 128) % 132 == 0
        assert 90e6 < layer.sums.block * n_comp * of_env <= 180e6


def peak(call):
    """Bytes that torch holds at most during a call, beyond what it held before."""
    call()  # what is made once is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes))


@pytest.mark.parametrize("activation", ["Softplus", "SiLU"])
def test_activations_stay_within_the_workspace(activation):
    """The estimate, beside what the way back really allocates; and blocks of atoms."""
    config = HipnnConfig(n_feat=128, species=ORGANIC, order=1, activation=activation)
    blocks = FusedHipnn(Hipnn(config, backend="triton"), "triton").layers
    layers = blocks[1].atoms
    mixed, z = torch.randn(N_ATOMS, 4, 128), torch.randn(N_ATOMS, 128)
    with Allocated() as seen:
        layers.backward(mixed, z, torch.randn(N_ATOMS, 128))
    # What is freed on the way is in this sum, but not in the workspace; what is read is not.
    most = 1.0 if activation == "SiLU" else 1.6
    assert 0.3 * seen.bytes < layers.bytes_per_atom * N_ATOMS < most * seen.bytes
    assert layers.workspace == (256e6 if activation == "SiLU" else 128e6)
    for block in blocks:
        assert block.max_block % 64 == 0
        fitting = layers.workspace / block.atoms.bytes_per_atom
        assert fitting - block.block - 64 < block.max_block <= fitting
        assert block.max_block % block.block == 0
        assert block.block % 16 == 0 and block.block <= block.max_block


class Allocated(Traffic):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in given]
        self.bytes += sum(x.nbytes for x in fresh)
        return result


@pytest.mark.parametrize("order", [1, 2])
def test_norms_and_their_gradient(order):
    interaction = Hipnn(HipnnConfig(species=METALS, n_feat=7, order=order)).double().blocks[1][0]
    m = torch.randn(5, (1, 4, 9)[order], 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 7, dtype=torch.float64)
    expected = interaction.layer.norms(m)
    (gradient,) = torch.autograd.grad((expected * g).sum(), m)
    found, pull = _norms(interaction.layer, m.detach())
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)
    assert torch.allclose(pull(g), gradient, rtol=1e-13, atol=1e-13)
