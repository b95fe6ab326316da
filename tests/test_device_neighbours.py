"""Neighbours by cells in torch against brute force and vesin; what crosses to the device."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import STRUCTURES, crystal, make_potential, to_atoms
from test_neighbours import PBC, as_dict, assert_complete, brute_force, crystals, histories
from torch.utils._python_dispatch import TorchDispatchMode

from md_plugin import calculator, device_neighbours, devices, neighbours
from md_plugin.calculator import HipnnCalculator
from md_plugin.device_neighbours import DeviceList, search_cells
from md_plugin.devices import Staging, moved
from md_plugin.model import fusion
from md_plugin.neighbours import NeighbourList, complete_cell, neighbour_pairs

CPU = torch.device("cpu")
# Whatever reads a number on the host, or finds out a size, waits for a GPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")


def whole_image(found):
    wraps = found.wraps[found.pairs.sender_long] - found.wraps[found.pairs.receiver]
    return found.images[found.image] + wraps


def search(x, cell, pbc, rcut, **settings):
    h = complete_cell(cell, np.broadcast_to(np.array(pbc), (3,)))
    return search_cells(torch.from_numpy(x), h[None], pbc, rcut, **settings)


@settings(max_examples=150, deadline=None)
@given(crystals(), st.sampled_from([3, 64, 1 << 21]))
def test_equals_brute_force(crystal, chunk):
    """Triclinic and tiny cells, any mix of directions, atoms far outside, in chunks of any size."""
    x, cell, pbc, rcut = crystal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_neighbours, "CHUNK", chunk)
        found = search(x, cell, pbc, rcut)
    pairs, expected = found.pairs, brute_force(x, cell, pbc, rcut)
    vectors = as_dict(x, cell, pairs, whole_image(found))
    for key in vectors.keys() ^ expected.keys():  # within rounding of the cutoff
        vector = vectors.get(key, expected.get(key))
        assert abs(np.linalg.norm(vector) - rcut) < 1e-9 * rcut, key
    assert pairs.sender.dtype == pairs.row_ptr.dtype == torch.int32
    r = np.array([np.linalg.norm(v) for v in vectors.values()])
    for start, end in zip(pairs.row_ptr[:-1], pairs.row_ptr[1:], strict=True):
        assert (np.diff(r[start:end]) > -1e-9).all()  # rounding of what is sorted


@pytest.mark.parametrize("pbc", PBC)
@pytest.mark.parametrize("rcut", [1.4, 3.1, 9.0])
def test_equals_vesin(pbc, rcut):
    """Several bins along each direction, and fewer than one."""
    rng = np.random.default_rng(5)
    cell = np.array([[8.0, 0.0, 0.0], [3.0, 7.0, 0.0], [-2.0, 1.0, 6.5]])
    x = rng.uniform(-1, 2, (60, 3)) @ cell
    pairs, image = neighbour_pairs(x, cell, pbc, rcut)
    found = search(x, cell, pbc, rcut)
    expected, vectors = (
        as_dict(x, cell, pairs, image),
        as_dict(x, cell, found.pairs, whole_image(found)),
    )
    assert vectors.keys() == expected.keys()
    assert torch.equal(found.pairs.row_ptr, pairs.row_ptr)


def test_receivers_are_the_first_atoms():
    """Local atoms and ghosts of an engine: open boundaries, and rows for local atoms alone."""
    x = np.random.default_rng(2).uniform(0, 9, (80, 3))
    for n_recv in (0, 1, 30, 80):
        found = search(x, np.zeros((3, 3)), False, 2.5, n_recv=n_recv)
        assert (found.pairs.n_recv, found.pairs.n_send) == (n_recv, 80)
        whole = neighbour_pairs(x, np.zeros((3, 3)), False, 2.5)[0]
        for i in range(n_recv):
            rows = [
                p.sender[p.row_ptr[i] : p.row_ptr[i + 1]].tolist() for p in (found.pairs, whole)
            ]
            assert sorted(rows[0]) == sorted(rows[1])


def test_no_atoms_one_atom_and_atoms_far_apart():
    assert search(np.zeros((0, 3)), np.eye(3), True, 5.0).pairs.n_pair == 0
    assert search(np.zeros((1, 3)), np.zeros((3, 3)), False, 5.0).pairs.n_pair == 0
    assert search(np.zeros((1, 3)), 2.0 * np.eye(3), True, 2.1).pairs.n_pair == 6
    # farther apart than there are bins: the last of them holds the rest
    x = np.array([[0.0, 0, 0], [0.5, 0, 0], [1e6, 0, 0], [1e6 + 0.5, 0, 0], [-1e9, 0, 0]])
    assert search(x, np.zeros((3, 3)), False, 1.0).pairs.sender.tolist() == [1, 0, 3, 2]


def test_too_many_images_and_pairs_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"reaches over \[61, 61, 61\] periodic images of this cell"
    ):
        search(np.zeros((1, 3)), np.eye(3), True, 30.0)
    monkeypatch.setattr(device_neighbours, "MAX_PAIRS", 5)
    with pytest.raises(ValueError, match="6 pairs; int32 indices reach 5"):
        search(np.zeros((1, 3)), 2.0 * np.eye(3), True, 2.1)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).split(".")[1]
        if name in WAITING or (name == "index" and args[1][0].dtype == torch.bool):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def test_a_search_makes_the_host_wait_twice_however_many_chunks(monkeypatch):
    monkeypatch.setattr(device_neighbours, "CHUNK", 100)
    x = np.random.default_rng(0).uniform(0, 5, (40, 3))
    # on a CPU, Pairs looks at its last entry
    monkeypatch.setattr(device_neighbours.Pairs, "__post_init__", lambda self: None)
    with Waits() as waits:
        pairs = search(x, 5.0 * np.eye(3), True, 2.0).pairs
    assert waits.names == ["_local_scalar_dense"] * 2 and pairs.n_pair > 200


# --- the list ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(histories())
def test_reused_list_misses_no_pair(history):
    rng, x, cell, pbc, shake, strain = history
    there, here = DeviceList(2.5, 0.6, CPU), NeighbourList(2.5, 0.6)
    for _ in range(4):
        assert there.update(x, cell, pbc) == here.update(x, cell, pbc)
        assert there.pairs.n_pair == here.pairs.n_pair
        assert_complete(there, x, cell, pbc)
        deformation = np.eye(3) + rng.uniform(-strain, strain, (3, 3))
        x = x @ deformation + rng.uniform(-shake, shake, x.shape)
        cell = cell @ deformation


def calculators(monkeypatch, **changes):
    """One with the list of a GPU, which here is a CPU, and one as it is on CPUs."""
    here = HipnnCalculator(make_potential(**changes))
    monkeypatch.setattr(calculator, "neighbour_list", lambda *args: DeviceList(*args, ordered=True))
    return HipnnCalculator(make_potential(**changes)), here


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_calculator_gives_the_same(structure, ordered, backend, monkeypatch):
    """Steps, strains, rebuilds, another species, in float64: only the order of sums differs."""
    monkeypatch.setattr(neighbours, "MANY_ATOMS", 1 if ordered else 10**6)
    there, here = calculators(monkeypatch, backend=backend)
    atoms, rng = to_atoms(structure()), np.random.default_rng(0)
    for step in range(5):
        for calc in (there, here):
            calc.calculate(atoms)
            calc.calculate(atoms, ["energy", "forces"])
        for name in ("energy", "energies", "forces", *(["stress"] if atoms.pbc.all() else [])):
            scale = np.abs(here.results[name]).max()
            np.testing.assert_allclose(
                there.results[name], here.results[name], rtol=0, atol=1e-11 * scale, err_msg=name
            )
        atoms.positions += rng.uniform(-0.15, 0.15, (len(atoms), 3))
        if step == 2:
            atoms.set_cell(1.01 * atoms.cell[:], scale_atoms=True)
            atoms.numbers[0] = atoms.numbers[-1]
    assert there.neighbours.n_builds == here.neighbours.n_builds > 1
    assert isinstance(there.neighbours, DeviceList)


def test_which_list_a_calculator_takes():
    assert type(calculator.neighbour_list(4.0, 0.5, CPU)) is NeighbourList
    assert type(calculator.neighbour_list(4.0, 0.5, torch.device("meta"))) is DeviceList


def test_a_step_sends_positions_and_nothing_else(monkeypatch):
    """24 bytes an atom; at a build the same once more, and the cell. Results come in one copy."""
    calc, _ = calculators(monkeypatch, backend="numba")
    atoms = to_atoms(crystal())
    fetched, fetch = [], devices.moved
    monkeypatch.setattr(fusion, "moved", lambda *args: fetched.append(len(args[0])) or fetch(*args))
    staging, sent = calc.neighbours.staging, []
    for step in range(4):
        before = staging.n_bytes
        calc.calculate(atoms, ["energy", "forces", "stress"])
        sent.append(staging.n_bytes - before)
        atoms.positions += 0.001
        if step == 2:
            atoms.positions[0] += 1.0
    n, cell = 24 * len(atoms), 72
    assert sent == [2 * n + cell, n, n, 2 * n + cell]
    assert fetched == [4] * 4  # energies, forces, virial, closest distance
    assert calc.neighbours.n_builds == 2


# --- memory on the way ------------------------------------------------------------------------


def test_staging_keeps_its_memory():
    staging = Staging(CPU)
    array = torch.arange(6.0).double().reshape(2, 3)
    first = staging.send(array)
    where = staging._memory.data_ptr()
    second = staging.send(array[:1] + 1)
    assert staging._memory.data_ptr() == where and len(staging._memory) == 48
    staging.send(torch.zeros(7, dtype=torch.float64))
    assert len(staging._memory) == 56 and staging.n_bytes == 48 + 24 + 56
    array.zero_()  # as an engine does with its own arrays
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]] and second.tolist() == [[1, 2, 3]]


def test_staging_waits_until_a_copy_has_left_its_memory():
    """The event of the last copy is asked for before the memory is written again."""
    staging, order = Staging(CPU), []

    class Event:
        def synchronize(self):
            order.append(("waited", staging._memory[:8].view(torch.float64).item()))

    staging.send(torch.tensor([1.0], dtype=torch.float64))
    staging._left = Event()
    staging.send(torch.tensor([2.0], dtype=torch.float64))
    assert order == [("waited", 1.0)]


def test_staging_asks_for_page_locked_memory_once(monkeypatch):
    asked, empty = [], torch.empty

    def recorded(*shape, pin_memory=False, **settings):
        asked.append((shape, pin_memory))
        return empty(*shape, **settings)

    staging = Staging(torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", recorded)
    for n in (4, 2, 4, 1):
        assert staging.room((n, 3), torch.float32).shape == (n, 3)
    assert asked == [((48,), True)]


def test_copies_of_a_staging_share_nothing():
    staging = Staging(CPU)
    staging.send(torch.ones(3))
    other = copy.deepcopy(staging)
    assert other.device == CPU and len(other._memory) == 0 and other._memory is not staging._memory


def test_moved_is_one_copy():
    parts = [torch.tensor(2.0), torch.rand(3, 2), torch.zeros(0, 4)]
    assert all(a is b for a, b in zip(moved(parts, CPU), parts, strict=True))
    there = moved(parts, torch.device("meta"))
    assert [p.shape for p in there] == [p.shape for p in parts]
    assert len({p.untyped_storage()._cdata for p in there}) == 1
    back = [p.to("cpu") for p in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, device: self.clone())
        elsewhere = moved(parts, torch.device("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(elsewhere, back, strict=True))
