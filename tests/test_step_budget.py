"""What a fused step on a GPU asks for: launches, bytes, memory; none of it grows with the pairs.

Counted with kernels that do nothing, at the shapes of real models; docs/gpu.md has the table.
"""

from itertools import accumulate

import pytest
import torch
from kernel_cases import absence
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md_plugin.model.atom_layers import AtomLayers, _norms
from md_plugin.model.config import HipnnConfig
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import Hipnn
from md_plugin.pairs import Geometry, Pairs

pytestmark = pytest.mark.skipif(bool(absence("triton")), reason=absence("triton") or "there")

N_ATOMS = 64
METALS, ORGANIC = (13,), (1, 6, 7, 8)
# 20 sensitivities, 3 atom layers; of one step: kernels, operators that are not views, and per atom
# kB in and out, and kB of the peak of memory beyond input and workspace. hippynn 0.1.3 with its
# Triton kernels: 124 and 217 kB for the first, 287 and 1,040 kB for "vector, 2 layers", beside what
# its kernels move and keep per pair.
BUDGET = {
    "scalar, 1 layer": ({"n_feat": 64, "species": METALS}, 2, 80, 24, 0.13),
    "scalar, 2 layers": ({"n_feat": 64, "species": METALS}, 4, 178, 146, 1.6),
    "vector, 1 layer": ({"n_feat": 128, "species": ORGANIC, "order": 1}, 2, 90, 122, 0.16),
    "vector, 2 layers": ({"n_feat": 128, "species": ORGANIC, "order": 1}, 4, 203, 920, 4.3),
    "quadrupole, 1 layer": ({"n_feat": 128, "species": ORGANIC, "order": 2}, 2, 103, 240, 0.16),
    "quadrupole, 2 layers": ({"n_feat": 128, "species": ORGANIC, "order": 2}, 4, 236, 1960, 6.9),
}


class Traffic(TorchDispatchMode):
    """Operators that are not views, and bytes of their arguments and results."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operators += 1
            moved = {(x.data_ptr(), x.shape): x.nbytes for x in tensors((args, kwargs, result))}
            self.bytes += sum(moved.values())
        return result


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def place(n_atoms, per_atom):
    receiver = torch.arange(n_atoms).repeat_interleave(per_atom)
    sender = (receiver + 1 + torch.arange(len(receiver)) % per_atom) % n_atoms
    pairs, _ = Pairs.from_edges(receiver, sender, n_atoms, n_atoms)
    return Geometry(torch.zeros(n_atoms, 3, dtype=torch.float64), pairs)


@pytest.mark.parametrize("name", BUDGET)
def test_launches_and_bytes_of_a_step(name, monkeypatch):
    from md_plugin.kernels import triton_fused
    from md_plugin.model import fused_device

    changes, kernels, operators, kilobytes, _ = BUDGET[name]
    monkeypatch.setattr(fused_device, "_multiplied", one_operator)
    config = HipnnConfig(n_interactions=int(name.split()[1]), **changes)
    step, launches = FusedHipnn(Hipnn(config, backend="triton"), "triton"), []
    for launch in ("forward", "backward"):
        monkeypatch.setattr(triton_fused, launch, lambda *args, **_: launches.append(args))
    counted = []
    for n_atoms, n_pair in ((N_ATOMS, 2), (N_ATOMS, 40), (2 * N_ATOMS, 2)):
        launches.clear()
        species, geometry = torch.full((n_atoms,), config.species[0]), place(n_atoms, n_pair)
        with torch.no_grad(), Traffic() as traffic:
            step.evaluate(species, geometry)
        counted.append((len(launches), traffic.operators, traffic.bytes))
    assert counted[0] == counted[1], "something grows with the number of pairs"
    assert counted[0][:2] == counted[2][:2]
    per_atom = (counted[2][2] - counted[0][2]) / N_ATOMS / 1000  # weights drop out
    assert counted[0][0] == kernels and counted[0][1] <= operators, counted
    assert per_atom <= kilobytes, f"{per_atom:.1f} kB per atom"


def one_operator(a, b):
    """A product of float16 to float32, as on a GPU."""
    return a.new_empty(len(a), b.shape[1], dtype=torch.float32)


@pytest.mark.parametrize("name", BUDGET)
def test_memory_of_a_step(name, monkeypatch):
    """Per atom, where blocks of atoms have one size; what a block takes is the workspace."""
    from md_plugin.kernels import triton_fused
    from md_plugin.model import fused_device

    monkeypatch.setattr(fused_device, "BLOCK_BYTES", 1)
    monkeypatch.setattr(fused_device.DeviceEngine, "workspace", 1)
    changes, *_, kept = BUDGET[name]
    config = HipnnConfig(n_interactions=int(name.split()[1]), **changes)
    step = FusedHipnn(Hipnn(config, backend="triton"), "triton")
    assert {layer.max_block for layer in step.layers} == {N_ATOMS}
    for launch in ("forward", "backward"):
        monkeypatch.setattr(triton_fused, launch, lambda *args, **_: None)
    peaks = []
    for n_atoms in (4 * N_ATOMS, 8 * N_ATOMS):
        species, geometry = torch.full((n_atoms,), config.species[0]), place(n_atoms, 2)
        peaks.append(peak(lambda at=(species, geometry): step.evaluate(*at)))
    per_atom = (peaks[1] - peaks[0]) / (4 * N_ATOMS) / 1000
    assert 0.5 * kept < per_atom <= kept, f"{per_atom:.2f} kB per atom"


def peak(call):
    """Bytes that torch holds at most during a call, beyond what it held before."""
    call()  # what is made once is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes))


def test_activations_stay_within_the_workspace():
    """The estimate, beside what operators of the way back really allocate; and blocks of atoms."""
    config = HipnnConfig(n_feat=128, species=ORGANIC, order=1)
    model = Hipnn(config, backend="triton")
    layers, blocks = AtomLayers(model, 1, plain=True), FusedHipnn(model, "triton").layers
    mixed, z = torch.randn(N_ATOMS, 4, 128), torch.randn(N_ATOMS, 128)
    with Allocated() as seen:
        layers.backward(mixed, z, torch.randn(N_ATOMS, 128))
    # What is freed on the way is in this sum, but not in the workspace.
    assert 0.3 * seen.bytes < layers.bytes_per_atom * N_ATOMS < seen.bytes
    for block in blocks:
        assert block.max_block % 64 == 0
        assert 0.9 * 256e6 < block.max_block * block.atoms.bytes_per_atom <= 256e6
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
