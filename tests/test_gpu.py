"""The first look at a real GPU: `pytest -m gpu`, some minutes, most of them Triton's compiler.

Needs neither ase, vesin nor LAMMPS. Everything is compared with float64 on the CPU, by torch's
plain operations; what takes the short way is compared with the long one. What the shapes of the
kernels are, their edge cases, is not for here: `test_triton_fused.py`, `test_triton_halves.py`,
`test_triton_fusion.py`, `test_kernels.py`, `test_products.py` and `test_sensitivity.py` run on a
GPU as well.
"""

import logging
from functools import cache

import numpy as np
import pytest
import torch
from kernel_cases import absence
from model_helpers import STRUCTURES, make_model

from lammps_interface.exchange import LammpsHalo
from md_plugin.device_neighbours import DeviceList, search_cells
from md_plugin.devices import Staging
from md_plugin.halo import IndexHalo
from md_plugin.kernels import get_backend, triton_halves, triton_matmul
from md_plugin.kernels.registry import self_check
from md_plugin.kernels.triton_arrays import halves
from md_plugin.model.graphs import CudaRecorder
from md_plugin.neighbours import Structure, complete_cell
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SKIN = 0.4
# 4 components times 16 sensitivities fill the 64 rows of warp groups; 20 and 40 fill no tile.
WIDE = {"n_nu": 20, "n_feat": 40, "reference_energies": ()}
NETWORKS = {
    "scalar": WIDE,
    "vector": {**WIDE, "order": 1},
    "quadrupole": {**WIDE, "order": 2, "n_hidden": 21},
    "invariants": {"order": 2, "n_max": 3, "reference_energies": ()},
}
# Relative to the largest force; "fast" multiplies in float16.
TOLERANCE = {"float64": 1e-11, "mixed": 1e-4, "fast": 2e-2}
CASES = [(name, "mixed") for name in NETWORKS] + [("vector", "float64"), ("vector", "fast")]


def box(n_side=3, spacing=1.9, seed=0):
    """A periodic crystal with noise, of three species."""
    rng = np.random.default_rng(seed)
    sites = np.stack(np.meshgrid(*[np.arange(n_side)] * 3), axis=-1).reshape(-1, 3)
    x = spacing * (sites + rng.uniform(-0.1, 0.1, sites.shape))
    cell = n_side * spacing * np.eye(3)
    return Structure(rng.choice([1, 6, 8], len(x)), x, cell, np.ones(3, bool))


def geometry(structure, rcut, device=CUDA):
    """With a skin; pairs are found on the device."""
    neighbours = DeviceList(rcut, SKIN, device)
    neighbours.update(structure.positions, structure.cell, structure.pbc)
    return neighbours.geometry(structure.positions, structure.cell)


def species(structure, device=CUDA):
    return torch.from_numpy(structure.species).to(device)


@cache
def potential(name, dtype="mixed", graphs="never", backend="triton"):
    found = Potential(make_model(backend=backend, **NETWORKS[name]), device=CUDA, dtype=dtype)
    found.graphs = graphs
    return found


def exact(name, structure):
    """On the CPU, in float64, by torch's plain operations."""
    model = Potential(make_model(backend="torch", **NETWORKS[name]), dtype="float64")
    return model.evaluate_geometry(species(structure, CPU), geometry(structure, model.rcut, CPU))


def evaluate(model, structure, **settings):
    return model.evaluate_geometry(species(structure), geometry(structure, model.rcut), **settings)


def close(found, expected, relative):
    """Largest difference, relative to the largest value."""
    found, expected = found.double().cpu(), expected.double().cpu()
    off, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert off <= relative * scale, f"off by {off:.1e}, where the largest is {scale:.1e}"


# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "cupy", "numba_cuda"])
@pytest.mark.parametrize("family", ["sums", "products", "sensitivities"])
def test_kernels(backend, family):
    if reason := absence(backend, "cuda"):
        pytest.skip(reason)
    self_check(get_backend(backend), "cuda", family)


@pytest.mark.parametrize("backend", ["triton", "cupy", "numba_cuda"])
def test_closed_sums_give_forces_and_gradients(backend):
    """Forces, and the gradient of their square in all weights: every kernel, twice."""
    if reason := absence(backend, "cuda"):
        pytest.skip(reason)
    structure, found = box(2), {}
    for device, name in ((CUDA, backend), (CPU, "torch")):
        model = Potential(make_model(backend=name, order=1), device=device, dtype="float64")
        place = geometry(structure, model.rcut, device)
        loss = model.evaluate_pairs(
            species(structure, device), place.pairs, place.r_ij(), create_graph=True
        )
        loss.forces.square().sum().backward()
        weights = [p.grad.cpu().ravel() for p in model.model.parameters() if p.grad is not None]
        found[device] = loss.forces.detach(), torch.cat(weights)
    for got, want in zip(found[CUDA], found[CPU], strict=True):
        close(got, want, 1e-9)


def test_offsets_beyond_2_31():
    """env of 2.2e9 numbers: what its last rows hold."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory")
    n, n_nu, n_feat = 2**17 + 3, 128, 128
    here = torch.arange(n + 1, dtype=torch.int32, device=CUDA)
    pairs = Pairs(here, (n - 1 - here[:-1]).contiguous(), n)
    sense, features = torch.rand(n, n_nu, device=CUDA), torch.rand(n, n_feat, device=CUDA)
    for backend in ("triton", "cupy"):
        if absence(backend, "cuda"):
            continue
        env = get_backend(backend).envsum(sense, features, pairs)
        last = slice(n - 3, n)
        close(env[last], sense[last, :, None] * features[:3].flip(0)[:, None], 1e-6)
        back = get_backend(backend).sensesum(env, features, pairs)
        del env
        close(back, sense * features.flip(0).square().sum(dim=1, keepdim=True), 1e-5)


# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_fused_step(name, dtype):
    structure = box()
    model = potential(name, dtype)
    assert not model.why_not_fused()
    found, expected = evaluate(model, structure), exact(name, structure)
    assert found.sums is not None
    close(found.forces, expected.forces, TOLERANCE[dtype])
    close(found.virial, expected.virial, 10 * TOLERANCE[dtype])
    close(found.atom_energy, expected.atom_energy, TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_graphs_change_nothing(name, dtype):
    """Also where lists grow and shrink, and buffers are made and recorded anew."""
    plain, recorded = potential(name, dtype), potential(name, dtype, "always")
    for n_side in (2, 3, 2):
        for seed in range(4):  # as it is, recorded, replayed, replayed
            structure = box(n_side, seed=seed)
            found, expected = evaluate(recorded, structure), evaluate(plain, structure)
            close(found.forces, expected.forces, TOLERANCE[dtype])
            close(found.virial, expected.virial, TOLERANCE[dtype])
            close(found.atom_energy, expected.atom_energy, TOLERANCE[dtype])
        assert recorded._step()._pieces


class Engine:
    """The first atoms twice, as an engine on the host exchanges their features."""

    def __init__(self, n):
        self.n, self.ntotal = n, 2 * n

    def forward_exchange(self, rows, _, width):
        assert rows.shape == (self.ntotal, width) and rows.device == CPU
        rows[self.n :] = rows[: self.n]

    def reverse_exchange(self, rows, _, width):
        rows[: self.n] += rows[self.n :]


@pytest.mark.parametrize(("n_interactions", "engine"), [(2, False), (3, True)])
def test_ghosts_in_segments(n_interactions, engine):
    """Each atom has a copy, and a halo, on the device or of an engine, is between two graphs."""
    x = torch.from_numpy(box(2).positions).to(CUDA)
    whole = search_cells(x, complete_cell(np.zeros((3, 3)), np.zeros(3, bool))[None], False, 3.4)
    n, sender = len(x), whole.pairs.sender.clone()
    swapped = whole.pairs.receiver < sender  # half of all pairs see the copy
    sender[swapped] += n
    place = Geometry(torch.cat([x, x]), Pairs(whole.pairs.row_ptr, sender, 2 * n))
    numbers = species(box(2)).repeat(2)
    halo = IndexHalo(torch.arange(n, device=CUDA))
    if engine:
        halo = LammpsHalo(Engine(n), n, CPU, staging=Staging(CUDA))
    model = make_model(backend="triton", n_interactions=n_interactions)
    never, always = (Potential(model, device=CUDA, dtype="float64") for _ in range(2))
    never.graphs, always.graphs = "never", "always"
    for k in range(4):
        place.x.add_(0.01 * torch.sin(k + place.x[:n]).repeat(2, 1))
        found, expected = (p.evaluate_geometry(numbers, place, halo=halo) for p in (always, never))
        close(found.forces, expected.forces, 1e-11)
    assert len(always._step()._pieces) == 2 * n_interactions - 1


def test_a_failed_recording_is_told_and_survived(caplog):
    """Memory of the last graph is still held; a step then asks the device for a number."""
    model, structure = Potential(make_model(backend="triton"), device=CUDA), box(2)
    for _ in range(3):
        expected = evaluate(model, structure)
    held, step, stream = model._step()._pieces[0][1], model._step(), torch.cuda.current_stream()
    step._buffers, segments = None, step._segments

    def waits(buffers):
        if torch.cuda.is_current_stream_capturing():
            float(buffers.geometry.x.sum())
        return (yield from segments(buffers))

    step._segments = waits
    with caplog.at_level(logging.WARNING, logger="md_plugin"):
        for _ in range(3):
            close(evaluate(model, structure).forces, expected.forces, 1e-5)
    assert "steps are not recorded in CUDA graphs" in caplog.text and held is not None
    assert step.recorder is None and torch.cuda.current_stream() == stream


def test_graphs_are_made_where_results_of_older_ones_are_held():
    recorder, x, held = CudaRecorder(CUDA), torch.ones(1000, device=CUDA), []
    for k in range(3):
        recorder.warm_up(lambda: x + 1)
        play, found = recorder.capture(lambda k=k: x + k)
        play()
        held.append(found)
        del play
    assert [float(found[0]) for found in held] == [1.0, 2.0, 3.0]


def test_a_fixed_order_gives_the_same_bits():
    structure, expected = box(), exact("vector", box())
    torch.use_deterministic_algorithms(True)
    try:
        model = potential("vector", "mixed", "auto")
        found = [evaluate(model, structure).forces for _ in range(4)]
        assert model._step()._pieces, "these steps are recorded, too"
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0], other) for other in found[1:])
    close(found[0], expected.forces, TOLERANCE["mixed"])


@pytest.mark.parametrize("exponent", [-60.0, -0.4, 0.0, 3.7, 60.0])
def test_halves_and_their_power_of_two(exponent):
    x = 2.0**exponent * torch.linspace(-1.0, 1.0, 4001, device=CUDA)
    found, power = x.new_empty(2, *x.shape, dtype=torch.float16), x.new_empty(())
    triton_halves.split(x, found, power)
    assert float(power) == 2.0 ** (np.floor(exponent) + 1)
    close(float(power) * found.double().sum(dim=0), x, 2.0**-21)


@pytest.mark.parametrize("n_half", [1, 2])
@pytest.mark.parametrize("n_row", [17_000, 400])
@pytest.mark.parametrize("n_sum, n_col", [(2560, 128), (128, 2560)])
def test_products_of_halves(n_row, n_sum, n_col, n_half):
    """Tiles of each kind; where sums are shared out, the same bits every time."""
    generator = torch.Generator(CUDA).manual_seed(0)
    sizes = (n_row, n_sum), (n_sum, n_col)
    a, b = (halves(torch.rand(s, generator=generator, device=CUDA) - 0.5, n_half) for s in sizes)
    counters, out = triton_matmul.counters(CUDA), a.new_empty(n_row, n_col, dtype=torch.float32)
    triton_matmul.product(a, b, out, counters)
    want = a.double().sum(dim=0) @ b.double().sum(dim=0)
    off = float((out - want).norm() / want.norm())
    assert off < {1: 5e-5, 2: 1e-6}[n_half], f"off by {off:.1e} of the norm"
    first = out.clone()
    for _ in range(20):
        triton_matmul.product(a, b, out.fill_(torch.nan), counters)
        assert torch.equal(out, first) and not counters.any()


def test_molecular_dynamics_with_graphs_and_without():
    """200 steps of which each tenth is looked at; energy is conserved, memory does not grow."""
    model, plain = potential("vector", "mixed", "auto"), potential("vector")
    structure = box(3, spacing=2.2)
    neighbours, h, dt = DeviceList(model.rcut, SKIN, CUDA), structure.cell, 0.004
    x, numbers = structure.positions.copy(), species(structure)
    v, f = np.zeros_like(x), None
    energies, held = [], []
    for step in range(201):
        neighbours.update(x, h, structure.pbc)
        place = neighbours.geometry(x, h)
        found = model.evaluate_geometry(numbers, place, results_on=CPU)
        if f is not None:
            v += 0.5 * dt * found.forces.numpy()
        f = found.forces.numpy()
        energies.append(float(found.energy) + 0.5 * (v**2).sum())
        if step % 10 == 0:
            expected = plain.evaluate_geometry(numbers, place)
            close(found.forces, expected.forces, 1e-5)
            held.append(torch.cuda.memory_allocated())
        v += 0.5 * dt * f
        x = x + dt * v
    kinetic = 0.5 * (v**2).sum()
    assert kinetic > 0 and np.ptp(energies) < 0.02 * max(kinetic, 1e-3)
    assert max(held[5:]) < 1.5 * held[5] + 1e6


# --- positions and lists ----------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_neighbours_equal_brute_force(name):
    structure, rcut = STRUCTURES[name](), 3.7
    cell, pbc = structure.cell, structure.pbc
    x = torch.from_numpy(structure.positions).to(CUDA)
    found = search_cells(x, complete_cell(cell, pbc)[None], pbc, rcut)
    reach = np.where(pbc, 4, 0)
    images = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in reach)), -1).reshape(-1, 3)
    d = structure.positions[None] - structure.positions[:, None]
    r = np.linalg.norm(d[:, :, None] + images @ cell, axis=-1)
    expected = np.sort(r[(r < rcut) & (r > 1e-9)])
    place = geometry(structure, rcut - SKIN)
    assert found.pairs.n_pair == len(expected) == place.pairs.n_pair
    assert found.pairs.row_ptr.diff().tolist() == ((r < rcut) & (r > 1e-9)).sum((1, 2)).tolist()
    lengths = torch.linalg.vector_norm(place.r_ij(), dim=1).cpu()
    np.testing.assert_allclose(lengths.sort().values, expected, rtol=1e-12)


def test_staged_arrays_arrive_although_memory_is_filled_again():
    staging, sent = Staging(CUDA), []
    for k in range(50):
        array = torch.full((100_000,), float(k), dtype=torch.float64)
        sent.append(staging.send(array))
        array.fill_(-1.0)
    assert [float(there.min()) for there in sent] == list(range(50))
    assert [float(there.max()) for there in sent] == list(range(50))
