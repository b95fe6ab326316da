"""Arrays of the host never get among those of a GPU, seen without one: torch's "meta" tensors.

They have shapes and no numbers, and their device is not the CPU: an array that is made without a
device, an index of the host or a look at a number raise, as on a GPU. Kernels of Triton are left
out, but are given no array of the host.
"""

import pytest
import torch
from graph_recorder import LAUNCHES
from kernel_cases import absence
from model_helpers import make_model
from torch.utils._pytree import tree_leaves

from md_plugin.batch_neighbours import BatchList, Systems
from md_plugin.halo import IndexHalo
from md_plugin.model import device_atoms, fused_device
from md_plugin.model.buffers import Buffers
from md_plugin.model.device_step import FusedStep
from md_plugin.model.fusion import FusedHipnn
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential

pytestmark = pytest.mark.skipif(bool(absence("triton")), reason=absence("triton") or "there")
META = torch.device("meta")
KINDS = {
    "scalar": {},
    "vector": {"order": 1, "activation": "PReLU"},
    "quadrupole": {"order": 2, "n_hidden": 3},
    "mixed Gaussians": {"n_gaussians": 7, "residual": False},
}
GRADES = {"float64": (torch.float64, False), "mixed": (torch.float32, False)}
GRADES |= {"fast": (torch.float32, True)}


@pytest.fixture
def launches(monkeypatch):
    """Launches that do nothing; how many there were."""
    made = []

    def launch(*arrays, **named):
        places = {x.device for x in tree_leaves((arrays, named)) if torch.is_tensor(x)}
        assert places <= {META}, f"a launch gets arrays on {places}"
        made.append(arrays)

    for room, name, _ in [*LAUNCHES, ("triton_fused", "mirror", "")]:
        monkeypatch.setattr(f"md_plugin.kernels.{room}.{name}", launch)
    monkeypatch.setattr(fused_device, "self_check", lambda *_: None)
    monkeypatch.setattr(device_atoms, "atoms_check", lambda *_: None)
    return made


def network(grade, **changes):
    dtype, fast = GRADES[grade]
    model = make_model(backend="triton", **changes).to(META, dtype)
    return FusedHipnn(model, "triton", fast)


def place(n_recv=6, n_send=6, n_pair=20):
    row_ptr, sender, image = (
        torch.zeros(n, dtype=dtype, device=META)
        for n, dtype in ((n_recv + 1, torch.int32), (n_pair, torch.int32), (n_pair, torch.int16))
    )
    x, shifts = (torch.zeros(n, 3, dtype=torch.float64, device=META) for n in (n_send, 27))
    return Geometry(x, Pairs(row_ptr, sender, n_send), image, shifts)


def species(n):
    return torch.full((n,), 6, device=META)


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_steps(kind, grade, launches):
    for split, shape in (("", ()), ("structures", (6, 3, 3)), ("atoms", (6, 3, 3))):
        found = network(grade, **KINDS[kind]).evaluate(species(6), place(), split=split)
        assert found.forces.shape == (6, 3) and len(found.parts if split else ()) == len(shape) * 2
        results = found.forces, found.virial, found.closest, found.atom_energy
        assert all(result.device == META for result in results)
    assert launches


def test_an_array_of_the_host_is_found(launches, monkeypatch):
    """What this file is for: a factory that has lost its device."""
    step, zeros = network("mixed"), torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor,
        "new_zeros",
        lambda x, *shape, dtype=None: zeros(x, *shape, dtype=dtype, device="cpu"),
    )
    with pytest.raises((RuntimeError, AssertionError), match=r"meta|cpu"):
        step.evaluate(species(6), place())


@pytest.mark.parametrize("changes", [{"order": 1}, {"order": 2, "n_max": 3}])
def test_closed_sums_and_their_training(changes):
    potential = Potential(make_model(backend="torch", **changes), device=META, dtype="mixed")
    geometry = place()
    found = potential.evaluate_pairs(
        species(6), geometry.pairs, geometry.r_ij(), structure=species(6) * 0, create_graph=True
    )
    (found.forces.square().sum() + found.energy.sum() + found.virial.sum()).backward()
    weights = [p.grad for p in potential.model.parameters() if p.grad is not None]
    assert len(weights) > 9 and {w.device for w in weights} == {META}


def test_buffers_and_halos(launches):
    """Of steps that are recorded: what is copied in, exchanged and cut out."""
    halo = IndexHalo(torch.zeros(3, dtype=torch.int64, device=META))
    geometry = place(6, 9)
    buffers = Buffers.build(geometry, halo, 6, 1.25)
    assert buffers.fit(geometry, halo)
    buffers.fill(species(9), geometry)
    step = FusedStep([network("mixed")])
    found = step._run(buffers, halo, lambda call: call())
    cut = buffers.cut(found, "structures")
    assert cut.forces.shape == (9, 3) and cut.parts.shape == (6, 3, 3)
    assert cut.forces.device == META and len(buffers.exchanged) == 2


def test_positions_of_a_batch():
    """Those of torch-sim: nearest images, and translations of systems."""
    x, cell = torch.zeros(4, 3, device=META).double(), torch.zeros(2, 3, 3, device=META).double()
    index = torch.zeros(4, dtype=torch.int64, device=META)
    systems = Systems(species(4), x, cell, index, (True, True, True))
    near, fractional = systems.near(None)
    near, _ = systems.near(fractional)
    batch = BatchList(3.0, 0.5)
    batch.pairs = place(4, 4).pairs
    batch._image, batch._image_system = torch.zeros(5, 3, device=META).double(), index[:1].expand(5)
    batch._translation = torch.zeros(20, dtype=torch.int16, device=META)
    geometry = batch.geometry(near)
    assert geometry.r_ij().shape == (20, 3) and geometry.x.device == META


def test_random_numbers_of_a_gpu_stay_as_they_are(monkeypatch):
    """torch.manual_seed seeds GPUs, too, whose states nobody would give back."""

    def seed(number):
        raise AssertionError("torch.manual_seed seeds all devices")

    monkeypatch.setattr(torch, "manual_seed", seed)
    before = torch.get_rng_state()
    device_atoms.atoms_check.cache_clear()
    device_atoms.atoms_check(torch.device("cpu"), torch.float64, 0)
    assert torch.equal(torch.get_rng_state(), before)
