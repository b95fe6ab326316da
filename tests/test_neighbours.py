"""Neighbour pairs against brute force, ASE and matscipy; reuse of a list within its skin."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md_plugin.neighbours import Batch, NeighbourList, Structure, complete_cell, neighbour_pairs
from md_plugin.ordering import space_filling_order

PBC = list(product((False, True), repeat=3))


def brute_force(x, cell, pbc, rcut):
    """{(receiver, sender, image): vector} by looking at every image that could be in reach."""
    inverse = np.linalg.inv(cell)
    span = np.ptp(x @ inverse, axis=0) if len(x) else np.zeros(3)
    # The component of a pair along reciprocal vector k is at most rcut long.
    reach = np.ceil(rcut * np.linalg.norm(inverse, axis=0) + span).astype(int)
    reach = np.where(pbc, reach, 0)
    images = np.array(list(product(*(range(-n, n + 1) for n in reach))))
    found = {}
    for i, j in product(range(len(x)), repeat=2):
        vectors = x[j] - x[i] + images @ cell
        for k in np.flatnonzero((vectors**2).sum(axis=1) < rcut**2):
            if i != j or images[k].any():
                found[i, j, *images[k].tolist()] = vectors[k]
    return found


def as_dict(x, cell, pairs, image):
    """The pairs in the form of `brute_force`, with vectors computed from the images."""
    keys = np.column_stack([pairs.receiver, pairs.sender, image.long()]).tolist()
    vectors = x[pairs.sender] - x[pairs.receiver] + image.numpy() @ cell
    assert len({tuple(key) for key in keys}) == len(keys), "a pair is there twice"
    return {tuple(key): vector for key, vector in zip(keys, vectors, strict=True)}


def assert_same_pairs(x, cell, pbc, rcut):
    pairs, image = neighbour_pairs(x, cell, pbc, rcut)
    found, expected = as_dict(x, cell, pairs, image), brute_force(x, cell, pbc, rcut)
    # A pair within rounding of the cutoff may fall on either side.
    for key in found.keys() ^ expected.keys():
        vector = found.get(key, expected.get(key))
        assert abs(np.linalg.norm(vector) - rcut) < 1e-9 * rcut, key
    for key in found.keys() & expected.keys():
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-12 * rcut)
    # both directions of every pair, with opposite images
    assert all((j, i, -a, -b, -c) in found for i, j, a, b, c in found)


@st.composite
def crystals(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell = np.diag(rng.uniform(1.0, 3.0, 3))
    # rows sheared by several lattice vectors, then turned anyhow and put in any order
    cell += np.tril(rng.uniform(-1.0, 1.0, (3, 3)) * draw(st.sampled_from([0.0, 1.0, 4.0])), -1)
    cell = (cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0])[rng.permutation(3)]
    n = draw(st.integers(0, 5))
    # up to two cells outside on either side
    x = rng.uniform(-2.0, 3.0, (n, 3)) @ cell
    return x, cell, draw(st.sampled_from(PBC)), draw(st.floats(0.2, 3.0))


@settings(max_examples=150, deadline=None)
@given(crystals())
def test_equals_brute_force(crystal):
    assert_same_pairs(*crystal)


@pytest.mark.parametrize("pbc", PBC)
@pytest.mark.parametrize("times", [0.3, 1.0, 3.0])
def test_cutoff_up_to_three_boxes(pbc, times):
    rng = np.random.default_rng(3)
    cell = np.array([[2.0, 0.0, 0.0], [0.9, 2.2, 0.0], [-0.7, 1.3, 2.1]])
    assert_same_pairs(rng.uniform(-1, 2, (3, 3)) @ cell, cell, pbc, 2.0 * times)


@pytest.mark.parametrize("pbc", PBC)
def test_equals_ase_and_matscipy(pbc):
    from ase import Atoms
    from ase.neighborlist import primitive_neighbor_list

    rng = np.random.default_rng(11)
    cell = np.array([[3.0, 0.0, 0.0], [2.5, 3.1, 0.0], [-1.4, 2.0, 2.8]])
    x = rng.uniform(0, 1, (5, 3)) @ cell
    ours = as_dict(x, cell, *neighbour_pairs(x, cell, pbc, 4.0)).keys()
    i, j, s = primitive_neighbor_list("ijS", pbc, cell, x, 4.0)
    assert {tuple(row) for row in np.column_stack([i, j, s]).tolist()} == ours
    matscipy = pytest.importorskip("matscipy.neighbours", reason="needs matscipy")
    atoms = Atoms(positions=x, cell=cell, pbc=pbc)
    i, j, s = matscipy.neighbour_list("ijS", atoms, 4.0)
    assert {tuple(row) for row in np.column_stack([i, j, s]).tolist()} == ours


def test_one_atom_sees_its_own_images():
    pairs, image = neighbour_pairs([[0.3, 0.1, 0.7]], 2.0 * np.eye(3), True, 2.1)
    assert pairs.sender.tolist() == pairs.receiver.tolist() == [0] * 6
    assert sorted(map(tuple, image.tolist())) == sorted(
        tuple(sign * row) for row in np.eye(3) for sign in (-1.0, 1.0)
    )


def test_one_atom_alone_and_no_atoms():
    pairs, image = neighbour_pairs([[1.0, 2.0, 3.0]], np.zeros((3, 3)), False, 5.0)
    assert (pairs.n_recv, pairs.n_pair, image.shape) == (1, 0, (0, 3))
    for pbc in (False, True):
        pairs, image = neighbour_pairs(np.zeros((0, 3)), np.eye(3), pbc, 5.0)
        assert (pairs.n_recv, pairs.n_send, pairs.n_pair, image.shape) == (0, 0, 0, (0, 3))


@pytest.mark.parametrize("pbc", PBC)
def test_missing_cell_vectors(pbc):
    """Zero rows where nothing is periodic: a molecule, a wire and a slab as ASE writes them."""
    rng = np.random.default_rng(5)
    full = np.array([[2.5, 0.4, 0.0], [0.3, 2.6, -0.2], [0.1, 0.5, 2.4]])
    cell = np.where(np.array(pbc)[:, None], full, 0.0)
    x = rng.uniform(-3, 3, (6, 3))
    # Images along missing vectors are zero, so any full cell gives the same pairs.
    expected = brute_force(x, full, pbc, 3.0)
    assert as_dict(x, full, *neighbour_pairs(x, cell, pbc, 3.0)).keys() == expected.keys()
    whole = complete_cell(cell, np.array(pbc))
    assert abs(np.linalg.det(whole)) > 1e-3
    np.testing.assert_array_equal(whole[list(pbc)], full[list(pbc)])


def test_images_are_whole_numbers_and_int32_rows():
    pairs, image = neighbour_pairs(np.zeros((1, 3)), np.eye(3), True, 3.0)
    assert image.dtype == torch.float64 and pairs.sender.dtype == torch.int32
    assert torch.equal(image, image.round())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_positions_that_are_not_finite(bad):
    x = np.zeros((4, 3))
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"positions are not finite: the first bad row is 2: .*"):
        neighbour_pairs(x, np.eye(3), True, 1.0)
    with pytest.raises(ValueError, match="first bad row is 2"):
        NeighbourList(1.0).update(x, np.eye(3), True)


def test_unusable_cells():
    x = np.zeros((1, 3))
    with pytest.raises(ValueError, match="cell vectors are not finite: the first bad row is 0"):
        neighbour_pairs(x, np.diag([np.nan, 1, 1]), True, 1.0)
    with pytest.raises(ValueError, match=r"lattice vector 1 is zero; set the cell or switch off"):
        neighbour_pairs(x, np.diag([1.0, 0, 1]), True, 1.0)
    with pytest.raises(ValueError, match=r"coplanar \(volume zero\)"):
        neighbour_pairs(x, [[1, 0, 0], [2, 0, 0], [0, 0, 1]], True, 1.0)


@pytest.mark.parametrize("rcut", [0.0, -1.0, np.nan, np.inf])
def test_unusable_cutoff(rcut):
    with pytest.raises(ValueError, match="rcut must be a positive number"):
        neighbour_pairs(np.zeros((2, 3)), np.eye(3), True, rcut)


# --- the skin ---------------------------------------------------------------------------------


def assert_complete(neighbours, x, cell, pbc):
    """No pair within rcut is missing, and vectors of stored pairs are right."""
    whole = complete_cell(cell, np.array(pbc))
    image = neighbours.image
    found = as_dict(x, whole, neighbours.pairs, image)
    r_ij = neighbours.r_ij(x, cell).numpy()
    np.testing.assert_allclose(r_ij, np.array(list(found.values())).reshape(-1, 3), atol=1e-12)
    expected = brute_force(x, whole, pbc, neighbours.rcut * (1 - 1e-12))
    assert expected.keys() <= found.keys()


@st.composite
def histories(draw):
    """A start, and small steps of positions and cell."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell = np.diag(rng.uniform(2.0, 3.5, 3)) + np.tril(rng.uniform(-2, 2, (3, 3)), -1)
    x = rng.uniform(-0.5, 1.5, (draw(st.integers(1, 4)), 3)) @ cell
    pbc = draw(st.sampled_from(PBC))
    shake, strain = draw(st.sampled_from([(0.1, 0.0), (0.03, 0.03), (0.0, 0.08), (0.3, 0.1)]))
    return rng, x, cell, pbc, shake, strain


@settings(max_examples=60, deadline=None)
@given(histories())
def test_reused_list_misses_no_pair(history):
    rng, x, cell, pbc, shake, strain = history
    neighbours = NeighbourList(rcut=2.5, skin=0.6)
    for _ in range(6):
        neighbours.update(x, cell, pbc)
        assert_complete(neighbours, x, cell, pbc)
        deformation = np.eye(3) + rng.uniform(-strain, strain, (3, 3))
        x = x @ deformation + rng.uniform(-shake, shake, x.shape)
        cell = cell @ deformation


def test_rebuild_exactly_when_needed():
    """Two atoms that approach may use up the skin between them, and not a hair more."""
    neighbours = NeighbourList(rcut=2.0, skin=0.5)
    start = np.array([[0.0, 0, 0], [2.6, 0, 0]])  # beyond rcut + skin: not in the list
    cell, pbc = 20.0 * np.eye(3), True
    assert neighbours.update(start, cell, pbc)
    assert neighbours.pairs.n_pair == 0
    for step, built in ((0.2499, False), (0.2501, True)):
        x = start + [[step, 0, 0], [-step, 0, 0]]
        assert neighbours.update(x, cell, pbc) is built
    assert neighbours.n_builds == 2
    assert neighbours.pairs.n_pair == 2


def test_uniform_translation_and_growing_cell():
    rng = np.random.default_rng(0)
    cell = 4.0 * np.eye(3)
    x = rng.uniform(0, 4, (4, 3))
    neighbours = NeighbourList(rcut=2.5, skin=0.5)
    neighbours.update(x, cell, True)
    # Growing with the cell brings nothing closer: the list stays.
    assert not neighbours.update(1.2 * x, 1.2 * cell, True)
    assert_complete(neighbours, 1.2 * x, 1.2 * cell, (True,) * 3)
    # Shrinking uses up the skin at 2.5 / 3.0.
    assert not neighbours.update(0.834 * x, 0.834 * cell, True)
    assert neighbours.update(0.833 * x, 0.833 * cell, True)
    assert_complete(neighbours, 0.833 * x, 0.833 * cell, (True,) * 3)


def test_cell_that_shrinks_around_resting_atoms():
    """The cell alone may bring images closer while no atom has moved."""
    x = np.array([[0.1, 0.1, 0.1], [1.5, 1.5, 1.5]])
    neighbours = NeighbourList(rcut=2.0, skin=0.3)
    neighbours.update(x, np.diag([4.0, 4.0, 4.0]), True)
    for edge in np.linspace(4.0, 2.5, 12):
        cell = np.diag([edge, 4.0, 4.0])
        neighbours.update(x, cell, True)
        assert_complete(neighbours, x, cell, (True,) * 3)


def test_whatever_else_changes_rebuilds():
    rng = np.random.default_rng(0)
    x, cell = rng.uniform(0, 3, (3, 3)), 3.0 * np.eye(3)
    neighbours = NeighbourList(rcut=2.0, skin=0.5)
    assert neighbours.update(x, cell, True)
    assert not neighbours.update(x, cell, (True, True, True))
    assert neighbours.update(x, cell, (True, True, False))
    assert_complete(neighbours, x, cell, (True, True, False))
    assert neighbours.update(x[:2], cell, (True, True, False))
    assert neighbours.pairs.n_recv == 2
    assert neighbours.update(x[:0], cell, (True, True, False))
    assert neighbours.pairs.n_recv == 0
    assert neighbours.r_ij(x[:0], cell).shape == (0, 3)
    assert neighbours.n_builds == 4


def test_no_skin_rebuilds_at_every_change():
    neighbours = NeighbourList(rcut=2.0, skin=0.0)
    x, cell = np.zeros((1, 3)), 3.0 * np.eye(3)
    assert neighbours.update(x, cell, True)
    assert not neighbours.update(x, cell, True)
    assert neighbours.update(x + 1e-6, cell, True)


def test_list_keeps_its_own_copy_of_positions():
    """An engine moves atoms in place; the list must compare with what it saw, not with itself."""
    neighbours = NeighbourList(rcut=2.0, skin=0.2)
    x, cell = np.zeros((1, 3)), 3.0 * np.eye(3)
    neighbours.update(x, cell, True)
    x += 1.0
    assert neighbours.update(x, cell, True)
    cell *= 0.5
    assert neighbours.update(x, cell, True)


def test_molecule_without_cell_reuses_its_list():
    rng = np.random.default_rng(0)
    x, cell = rng.uniform(0, 3, (5, 3)), np.zeros((3, 3))
    neighbours = NeighbourList(rcut=2.0, skin=0.5)
    assert neighbours.update(x, cell, False)
    assert not neighbours.update(x + rng.uniform(-0.1, 0.1, x.shape), cell, False)


# --- batches ----------------------------------------------------------------------------------


def structure(rng, n, pbc=True):
    cell = 3.0 * np.eye(3) + rng.uniform(-0.5, 0.5, (3, 3))
    return Structure(np.full(n, 6), rng.uniform(0, 1, (n, 3)) @ cell, cell, np.array([pbc] * 3))


def test_batch_joins_structures():
    rng = np.random.default_rng(0)
    sizes = [3, 0, 1, 4]
    structures = [structure(rng, n, pbc=k != 2) for k, n in enumerate(sizes)]
    batch = Batch.from_structures(structures, rcut=3.5)
    assert batch.n_atoms.tolist() == sizes and batch.n_structures == 4
    assert batch.structure.tolist() == [0] * 3 + [2] + [3] * 4
    receiver, sender = batch.pairs.receiver, batch.pairs.sender_long
    assert torch.equal(batch.structure[receiver], batch.structure[sender])
    first = 0
    for k, single in enumerate(structures):
        alone = Batch.from_structures([single], rcut=3.5)
        mine = batch.structure[receiver] == k
        torch.testing.assert_close(batch.r_ij[mine], alone.r_ij, rtol=0, atol=0)
        assert torch.equal(sender[mine] - first, alone.pairs.sender_long)
        volume = abs(np.linalg.det(single.cell)) if single.pbc.all() else np.nan
        np.testing.assert_allclose(batch.volume[k], volume)
        first += sizes[k]


def test_batch_errors():
    with pytest.raises(ValueError, match="a batch needs at least one structure"):
        Batch.from_structures([], rcut=3.0)
    wrong = Structure(np.array([6, 6]), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="2 species but 3 positions"):
        Batch.from_structures([wrong], rcut=3.0)


# --- order in space ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_space_filling_order_is_a_permutation(n):
    x = np.random.default_rng(0).normal(size=(n, 3))
    assert sorted(space_filling_order(x, 0.3)) == list(range(n))


def test_space_filling_order_follows_the_interleaved_bits():
    """Corners of a cube in the order of Morton's curve: x changes fastest; ties stay in order."""
    corners = np.array([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], dtype=float)
    shuffled = np.random.default_rng(1).permutation(8)
    assert shuffled[space_filling_order(corners[shuffled], 1.0)].tolist() == list(range(8))
    assert space_filling_order(np.zeros((5, 3)), 1.0).tolist() == list(range(5))


def test_space_filling_order_bridges_the_highest_bits():
    """Neighbours along x at cells 2^19 - 1 and 2^19 of 2^20: all bits of the index count."""
    x = np.zeros((3, 3))
    x[:, 0] = [2**20 - 1, 2**19, 2**19 - 1]
    assert space_filling_order(np.vstack([x, np.zeros((1, 3))]), 1.0).tolist() == [3, 2, 1, 0]


def test_ordered_neighbours_are_near_in_memory():
    x = np.random.default_rng(0).uniform(0, 20.0, (8000, 3))
    cell, reach = 20.0 * np.eye(3), {}
    for ordered in (False, True):
        neighbours = NeighbourList(rcut=1.5, skin=0.0, ordered=ordered)
        neighbours.update(x, cell, True)
        pairs = neighbours.pairs
        reach[ordered] = float((pairs.receiver - pairs.sender_long).abs().double().median())
        r = neighbours.r_ij(x, cell).norm(dim=1)
        assert bool((r < 1.5).all())
    assert neighbours.order is not None
    assert reach[True] < 0.15 * reach[False]
