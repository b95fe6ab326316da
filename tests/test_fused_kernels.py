"""Fused kernels against a plain torch float64 autograd implementation of the same formulas."""

import math

import numpy as np
import pytest
import torch

from md_plugin.kernels.fused_cpu import (
    Gradients,
    RadialTable,
    backward,
    forward,
    geometry,
    tensor_backward,
    tensor_forward,
)
from md_plugin.model.radial import TensorComponents, tensor_components

# float32 rounds a distance to 6e-8, which Gaussians of a tenth of it in width amplify tenfold, and
# sums of some dozen terms of both signs are compared to the largest of their results.
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}


def system(seed, n_recv, n_ghost, n_pair, shifted, box=6.0, rcut=4.0):
    """Random positions and rows, some empty, some pairs beyond the cutoff."""
    rng = np.random.default_rng(seed)
    n_send = n_recv + n_ghost
    x = rng.uniform(0, box, (n_send, 3))
    receiver = np.sort(rng.choice(np.arange(0, n_recv, 2), n_pair))
    sender = rng.integers(0, n_send, n_pair)
    # As many translations as 16 bits can name; the atoms use the first and the last.
    translations = np.zeros((32768, 3))
    translations[[1, 32767]] = [box, 0, 0], [0, -box, 0.5]
    which = rng.choice([0, 1, 32767], n_pair).astype(np.int16)
    d = x[sender] - x[receiver] + (translations[which] if shifted else 0.0)
    keep = np.linalg.norm(d, axis=1) > 1.0
    receiver, sender = receiver[keep], sender[keep].astype(np.int32)
    row_ptr = np.searchsorted(receiver, np.arange(n_recv + 1)).astype(np.int32)
    images = (which[keep], translations) if shifted else (None, None)
    return geometry(x, row_ptr, sender, *images, rng.integers(0, 3, n_send)), receiver


def radial_parameters(n_nu, rcut):
    mu = 1.0 / np.linspace(1 / (0.9 * rcut), 1 / 1.25, n_nu)
    return mu, np.full(n_nu, 2 * n_nu * 1.25)


class Exact:
    """Distances and sensitivities in float64, for autograd."""

    def __init__(self, where, receiver, mu, sigma, rcut):
        x, sender = torch.tensor(where.x[:, :3].copy()), torch.tensor(where.sender).long()
        self.x, self.sender, self.receiver = x.requires_grad_(), sender, torch.tensor(receiver)
        self.strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        d = x[sender] - x[self.receiver]
        if len(where.translation):
            d = d + torch.tensor(where.translations[where.translation, :3].copy())
        self.d = d + d @ self.strain
        self.r = torch.linalg.vector_norm(self.d, dim=1, keepdim=True)
        mu, sigma = torch.tensor(mu), torch.tensor(sigma)
        cut = torch.where(self.r < rcut, torch.cos(math.pi * self.r / (2 * rcut)) ** 2, 0.0)
        self.sense = torch.exp(-0.5 * (sigma * (1 / self.r - 1 / mu)) ** 2) * cut
        self.n_recv = len(where.row_ptr) - 1
        inside = self.r[self.r < rcut]
        self.closest = float(inside.detach().min()) if len(inside) else math.inf

    def sum(self, terms):
        """Over the pairs of each receiver."""
        zeros = torch.zeros(self.n_recv, *terms.shape[1:], dtype=torch.float64)
        return zeros.index_add(0, self.receiver, terms)

    def gradients(self, sums, weights, features):
        """Forces, dE/dfeatures, virial."""
        energy = (sums * torch.tensor(weights, dtype=torch.float64)).sum()
        gx, gz, gs = torch.autograd.grad(energy, [self.x, features, self.strain])
        return sums.detach().numpy(), -gx.numpy(), gz.numpy(), -gs.numpy()


def reference(where, receiver, mu, sigma, rcut, z, ge):
    """env, forces, dE/dz and virial by autograd in float64."""
    exact = Exact(where, receiver, mu, sigma, rcut)
    z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    env = exact.sum(exact.sense[:, :, None] * z[exact.sender][:, None, :])
    return exact.gradients(env, ge, z)


def tensor_reference(where, receiver, mu, sigma, rcut, q, g, by_species):
    """mixed, forces, dE/dq and virial by autograd in float64."""
    exact = Exact(where, receiver, mu, sigma, rcut)
    q = torch.tensor(q, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor(where.species).long()[exact.sender] if by_species else exact.sender
    u = torch.einsum("pn,pnb->pb", exact.sense, q[owner])
    order = {1: 0, 4: 1, 9: 2, 16: 3}[g.shape[1]]
    components = (
        TensorComponents(3) if order == 3 else lambda r_hat: tensor_components(r_hat, order)
    )
    t = components(exact.d / exact.r)
    return exact.gradients(exact.sum(t[:, :, None] * u[:, None]), g, q)


def error(ours, exact):
    return np.abs(ours - exact).max() / max(np.abs(exact).max(), 1e-30)


def run(where, table, z, ge, n_block=1000, n_thread=1):
    n_recv, dtype = len(where.row_ptr) - 1, table.dtype.type
    env = np.full(ge.shape, np.nan, dtype)
    gradients = Gradients(len(where.x), 0 if z is None else z.shape[1], dtype, n_thread)
    for begin in range(0, n_recv, n_block):
        end = min(begin + n_block, n_recv)
        forward(where, table, z, env[begin:end], begin, n_thread)
        backward(where, table, z, ge[begin:end], gradients, begin)
    return env, *gradients.total(), gradients.closest


def run_tensor(where, table, q, g, by_species, n_block=1000, n_thread=1):
    n_recv, dtype = len(where.row_ptr) - 1, table.dtype.type
    mixed = np.full(g.shape, np.nan, dtype)
    n_feat = 0 if by_species else q.shape[1] * q.shape[2]
    gradients = Gradients(len(where.x), n_feat, dtype, n_thread)
    for begin in range(0, n_recv, n_block):
        rows = slice(begin, min(begin + n_block, n_recv))
        given = where, table, q
        tensor_forward(*given, mixed[rows], begin, n_thread, by_species=by_species)
        tensor_backward(*given, g[rows], gradients, begin, by_species=by_species)
    forces, dq, virial = gradients.total()
    return mixed, forces, None if by_species else dq.reshape(q.shape), virial, gradients.closest


def check(ours, exact, dtype, factor=1.0):
    """Both as sums, forces, gradient of the features or None, virial."""
    both = [(a, b) for a, b in zip(ours[:4], exact, strict=True) if a is not None]
    errors = [error(a, b) for a, b in both]
    assert max(errors) < factor * TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_nu, n_feat", [(9, 7), (20, 41), (20, 64), (3, 128), (21, 80), (1, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_layer(dtype, n_nu, n_feat, shifted):
    rcut = 4.0
    where, receiver = system(n_nu, 31, 13, 900, shifted)
    rng = np.random.default_rng(1)
    z = rng.normal(size=(44, n_feat)).astype(dtype)
    ge = rng.normal(size=(31, n_nu, n_feat)).astype(dtype)
    mu, sigma = radial_parameters(n_nu, rcut)
    exact = reference(where, receiver, mu, sigma, rcut, z, ge)
    for reach in (None, np.inf):
        table = RadialTable.build(mu, sigma, rcut, dtype, reach=reach)
        for n_block, n_thread in ((31, 1), (10, 2)):
            check(run(where, table, z, ge, n_block, n_thread), exact, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_species", [1, 3])
def test_first_layer(dtype, n_species):
    rcut, n_nu = 4.0, 9
    where, receiver = system(5, 31, 13, 900, True)
    species = where.species % n_species
    where = where._replace(species=species)
    one_hot = np.eye(n_species)[species]
    ge = np.random.default_rng(1).normal(size=(31, n_nu, n_species)).astype(dtype)
    mu, sigma = radial_parameters(n_nu, rcut)
    exact = reference(where, receiver, mu, sigma, rcut, one_hot, ge)
    table = RadialTable.build(mu, sigma, rcut, dtype)
    for n_block, n_thread in ((31, 1), (10, 2)):
        env, forces, _, virial, _ = run(where, table, None, ge, n_block, n_thread)
        check((env, forces, None, virial), exact, dtype)


@pytest.mark.parametrize("order", ["shuffled", "wide", "narrow", "negative"])
def test_trained_parameters(order):
    """Centres in any order, widths of any size."""
    rcut, n_nu, n_feat = 4.0, 12, 20
    where, receiver = system(3, 31, 13, 900, False)
    rng = np.random.default_rng(1)
    mu, sigma = radial_parameters(n_nu, rcut)
    if order == "shuffled":
        mu = rng.permutation(mu)
    sigma = sigma * {"wide": 0.05, "narrow": 20.0, "negative": -1.0}.get(order, 1.0)
    z = rng.normal(size=(44, n_feat)).astype(np.float32)
    ge = rng.normal(size=(31, n_nu, n_feat)).astype(np.float32)
    exact = reference(where, receiver, mu, sigma, rcut, z, ge)
    table = RadialTable.build(mu, sigma, rcut)
    # Narrow Gaussians amplify the rounding of r by their width over r.
    check(run(where, table, z, ge), exact, np.float32, 20 if order == "narrow" else 1)


def test_exactly_zero_from_the_cutoff_on():
    x = np.array([[0.0, 0, 0], [4.0, 0, 0], [0, 5.0, 0]])
    where = geometry(x, np.array([0, 2], np.int32), np.array([1, 2], np.int32))
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    env = np.full((1, 9, 5), np.nan, np.float32)
    forward(where, table, np.ones((3, 5), np.float32), env)
    assert (env == 0.0).all()


def test_unused_features_of_others_do_not_leak():
    """NaN features and positions of atoms that nobody sees change nothing."""
    x = np.array([[0.0, 0, 0], [2.0, 0, 0], [np.nan] * 3])
    where = geometry(x, np.array([0, 1], np.int32), np.array([1], np.int32))
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    z = np.ones((3, 5), np.float32)
    z[[0, 2]] = np.nan
    env = np.full((1, 9, 5), np.nan, np.float32)
    forward(where, table, z, env)
    assert np.isfinite(env).all()


def test_nan_position_gives_nan():
    x = np.array([[0.0, 0, 0], [np.nan, 0, 0]])
    where = geometry(x, np.array([0, 1], np.int32), np.array([1], np.int32))
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    env = np.zeros((1, 9, 5), np.float32)
    forward(where, table, np.ones((2, 5), np.float32), env)
    assert np.isnan(env).any()


def test_reproducible_bit_by_bit():
    where, _ = system(5, 31, 13, 900, True)
    rng = np.random.default_rng(1)
    z = rng.normal(size=(44, 20)).astype(np.float32)
    ge = rng.normal(size=(31, 9, 20)).astype(np.float32)
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    first, second = (run(where, table, z, ge, 16, 2)[:4] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


# Vectors of 16, 8, 4 or 2 lanes: widths below, at and above one tile of any of them.
SHAPES = [(1, 9, 1), (4, 9, 7), (4, 20, 128), (9, 9, 32), (9, 3, 41), (4, 1, 1), (9, 1, 70)]
SHAPES += [(16, 9, 5), (16, 20, 33)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_comp, n_nu, n_feat", SHAPES)
@pytest.mark.parametrize("by_species", [False, True])
def test_tensor_layer(dtype, n_comp, n_nu, n_feat, by_species):
    rcut = 4.0
    where, receiver = system(n_nu, 31, 13, 900, n_feat != 41)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(3 if by_species else 44, n_nu, n_feat)).astype(dtype)
    g = rng.normal(size=(31, n_comp, n_feat)).astype(dtype)
    mu, sigma = radial_parameters(n_nu, rcut)
    exact = tensor_reference(where, receiver, mu, sigma, rcut, q, g, by_species)
    table = RadialTable.build(mu, sigma, rcut, dtype)
    # Threads share out rows in the same way whatever is summed: once is enough to compile for.
    for n_block, n_thread in ((10, 1), (10, 2))[: 2 if n_comp == 4 else 1]:
        check(run_tensor(where, table, q, g, by_species, n_block, n_thread), exact, dtype)


def poisoned(counts, poison, seed=0):
    """Rows of given lengths behind one whose 40 pairs are all NaN, or infinitely far away."""
    rng = np.random.default_rng(seed)
    n_recv = len(counts) + 1
    x = np.concatenate([rng.uniform(0, 2, (n_recv, 3)), 2.5 + rng.uniform(0, 1, (50, 3))])
    x[0] = poison
    counts = [40, *counts]
    sender = np.concatenate([n_recv + rng.permutation(50)[:n] for n in counts]).astype(np.int32)
    row_ptr = np.cumsum([0, *counts]).astype(np.int32)
    species = rng.integers(0, 3, len(x))
    return geometry(x, row_ptr, sender, None, None, species)


def without_first(where):
    """Without the poisoned row, and which receiver each pair has."""
    counts = np.diff(where.row_ptr)
    kept = geometry(
        np.where(np.isfinite(where.x[:, :3]), where.x[:, :3], 0.0),
        np.cumsum([0, 0, *counts[1:]]),
        where.sender[counts[0] :],
        None,
        None,
        where.species,
    )
    return kept, np.repeat(np.arange(1, len(counts)), counts[1:])


@pytest.mark.parametrize("kind", ["scalar", "one-hot", "1", "4", "9"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_short_rows_do_not_see_what_longer_ones_left(kind, dtype, poison):
    """0 NaN would be NaN: the last vector of a row must not touch what is behind the row.

    The short rows come after the poisoned one in the same call, in the same work space.
    """
    where = poisoned([1, 2, 3, 0, 17], poison)
    kept, receiver = without_first(where)
    n_nu, n_feat, rcut = 9, 5, 4.0
    rng = np.random.default_rng(1)
    mu, sigma = radial_parameters(n_nu, rcut)
    table = RadialTable.build(mu, sigma, rcut, dtype)
    rows = (len(where.row_ptr) - 1,)
    if kind in ("scalar", "one-hot"):
        hot = kind == "one-hot"
        z = np.eye(3)[where.species] if hot else rng.normal(size=(len(where.x), n_feat))
        z, ge = z.astype(dtype), rng.normal(size=(*rows, n_nu, 3 if hot else n_feat)).astype(dtype)
        exact = reference(kept, receiver, mu, sigma, rcut, z, ge)
        given = (where, table, None if hot else z, ge)
        dirty, clean = run(*given), run(kept, *given[1:])
    else:
        q = rng.normal(size=(len(where.x), n_nu, n_feat)).astype(dtype)
        g = rng.normal(size=(*rows, int(kind), n_feat)).astype(dtype)
        exact = tensor_reference(kept, receiver, mu, sigma, rcut, q, g, False)
        dirty, clean = (run_tensor(w, table, q, g, False) for w in (where, kept))
    if kind == "one-hot":
        dirty, clean = (*dirty[:2], None, *dirty[3:]), (*clean[:2], None, *clean[3:])
    check(clean, exact, dtype)
    if np.isinf(poison):  # dropped like any pair beyond the cutoff
        check(dirty, exact, dtype)
        assert dirty[4] == clean[4]
    else:
        assert np.isnan(dirty[0][0]).any()
        assert error(dirty[0][1:], exact[0][1:]) < TOLERANCE[dtype]
        own = slice(1, *rows)
        assert error(dirty[1][own], exact[1][own]) < TOLERANCE[dtype]


@pytest.mark.parametrize("n_comp", [None, 4, 9, 16])
def test_virial_is_finite_behind_poison(n_comp):
    """The virial of the block behind the poisoned row, whose work space is fresh but short."""
    where = poisoned([1, 2, 3], np.nan)
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    gradients = Gradients(len(where.x), 9 * 5 if n_comp else 5)
    if n_comp:
        q, g = np.ones((len(where.x), 9, 5), np.float32), np.ones((3, n_comp, 5), np.float32)
        tensor_backward(where, table, q, g, gradients, 1)
    else:
        z, ge = np.ones((len(where.x), 5), np.float32), np.ones((3, 9, 5), np.float32)
        backward(where, table, z, ge, gradients, 1)
    assert all(np.isfinite(x).all() for x in gradients.total())


def test_closest_pair():
    x = np.array([[0.0, 0, 0], [1.5, 0, 0], [0, 1.25, 0], [0, 0, 4.5]])
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0, np.float64)
    for senders, closest in (([1, 2, 3], 1.25), ([1, 3], 1.5), ([3], math.inf), ([], math.inf)):
        row_ptr = np.array([0, len(senders), len(senders)], np.int32)
        where = geometry(x, row_ptr, np.array(senders, np.int32), species=np.zeros(4, np.int32))
        z, ge = np.ones((4, 2)), np.ones((2, 9, 2))
        assert run(where, table, z, ge)[-1] == pytest.approx(closest)
        assert run(where, table, None, ge[:, :, :1].copy(), 1, 2)[-1] == pytest.approx(closest)
        q, g = np.ones((4, 9, 2)), np.ones((2, 4, 2))
        assert run_tensor(where, table, q, g, False)[-1] == pytest.approx(closest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_virials_of_atoms_add_up_on_any_number_of_threads(dtype):
    """And forces and their sum stay what they are without them, to the last bit."""
    where, _ = system(5, 31, 13, 900, True)
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0, dtype)
    rng, found = np.random.default_rng(0), []
    z, ge = rng.normal(size=(44, 6)).astype(dtype), rng.normal(size=(31, 9, 6)).astype(dtype)
    for n_thread in (1, 3):
        with_atoms, without = (Gradients(44, 6, dtype, n_thread, k) for k in (True, False))
        backward(where, table, z, ge, with_atoms)
        backward(where, table, z, ge, without)
        for ours, other in zip(with_atoms.total(), without.total(), strict=True):
            np.testing.assert_array_equal(ours, other)
        assert without.atom_virials.shape == (0, 3, 3)
        found.append(with_atoms.atom_virials)
        assert error(found[-1].sum(axis=0), with_atoms.total()[2]) < TOLERANCE[dtype]
    assert np.abs(found[0]).max(axis=(1, 2)).min() > 0
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-13 * np.abs(found[0]).max())


@pytest.mark.parametrize("n_thread", [1, 2])
def test_empty_system(n_thread):
    nothing = np.empty(0, np.int32)
    where = geometry(np.empty((0, 3)), np.zeros(1, np.int32), nothing, species=nothing)
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    gradients = Gradients(0, 9 * 5, np.float32, n_thread)
    q, mixed = np.empty((0, 9, 5), np.float32), np.empty((0, 4, 5), np.float32)
    tensor_forward(where, table, q, mixed, 0, n_thread)
    tensor_backward(where, table, q, mixed, gradients)
    gradients = Gradients(0, 5, np.float32, n_thread)
    z, env = np.empty((0, 5), np.float32), np.empty((0, 9, 5), np.float32)
    forward(where, table, z, env, 0, n_thread)
    backward(where, table, z, env, gradients)
    forces, _, virial = gradients.total()
    assert forces.shape == (0, 3) and (virial == 0.0).all() and gradients.closest == math.inf


def test_arrays_of_other_kinds_are_refused():
    where, _ = system(5, 31, 13, 900, False)
    table = RadialTable.build(*radial_parameters(9, 4.0), 4.0)
    z, env = np.ones((44, 6), np.float32), np.ones((31, 9, 6), np.float32)
    with pytest.raises(ValueError, match="atom 2 is of none"):
        geometry(where.x[:3, :3], where.row_ptr, where.sender, species=np.array([0, 1, -1]))
    with pytest.raises(TypeError, match="float64"):
        forward(where, table, z.astype(float), env)
    with pytest.raises(ValueError, match="C-contiguous"):
        forward(where, table, z[:, ::2], env[:, :, :3].copy())
    with pytest.raises(ValueError, match="shape"):
        forward(where, table, z[:3], env)
    with pytest.raises(ValueError, match="receivers 1"):
        forward(where, table, z, env, 1)
    with pytest.raises(ValueError, match=r"n_block, 1 . 4 . 9"):
        tensor_forward(where, table, np.ones((44, 9, 6), np.float32), env[:, :5].copy())
