"""Fused kernels against a plain torch float64 autograd implementation of the same formulas."""

import math

import numpy as np
import pytest
import torch

from md_plugin.kernels.fused_cpu import (
    Geometry,
    Gradients,
    RadialTable,
    backward,
    forward,
    geometry,
)

TOLERANCE = {np.float32: 1e-5, np.float64: 2e-13}


def system(seed, n_recv, n_ghost, n_pair, shifted, box=6.0, rcut=4.0):
    """Random positions and rows, some empty, some pairs beyond the cutoff."""
    rng = np.random.default_rng(seed)
    n_send = n_recv + n_ghost
    x = rng.uniform(0, box, (n_send, 3))
    receiver = np.sort(rng.choice(np.arange(0, n_recv, 2), n_pair))
    sender = rng.integers(0, n_send, n_pair)
    shift_id = rng.integers(0, 3, n_pair).astype(np.uint8) if shifted else None
    shifts = np.array([[0.0, 0, 0], [box, 0, 0], [0, -box, 0.5]]) if shifted else None
    d = x[sender] - x[receiver] + (shifts[shift_id] if shifted else 0.0)
    keep = np.linalg.norm(d, axis=1) > 1.0
    receiver, sender = receiver[keep], sender[keep].astype(np.int32)
    row_ptr = np.searchsorted(receiver, np.arange(n_recv + 1)).astype(np.int32)
    species = rng.integers(0, 3, n_send)
    if shifted:
        shift_id = np.ascontiguousarray(shift_id[keep])
    return geometry(x, row_ptr, sender, shift_id, shifts, species), receiver


def radial_parameters(n_nu, rcut):
    mu = 1.0 / np.linspace(1 / (0.9 * rcut), 1 / 1.25, n_nu)
    return mu, np.full(n_nu, 2 * n_nu * 1.25)


def reference(where, receiver, mu, sigma, rcut, z, ge):
    """env, forces, dE/dz and virial by autograd in float64."""
    x, sender = torch.tensor(where.x[:, :3].copy()), torch.tensor(where.sender).long()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    receiver = torch.tensor(receiver)
    x.requires_grad_()
    z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    d = x[sender] - x[receiver]
    if len(where.translation):
        d = (
            d
            + torch.tensor(where.translations[:, :3].copy())[torch.tensor(where.translation).long()]
        )
    d = d + d @ strain
    r = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    mu, sigma = torch.tensor(mu), torch.tensor(sigma)
    cut = torch.where(r < rcut, torch.cos(math.pi * r / (2 * rcut)) ** 2, 0.0)
    sense = torch.exp(-0.5 * (sigma * (1 / r - 1 / mu)) ** 2) * cut
    n_recv = len(where.row_ptr) - 1
    env = torch.zeros(n_recv, len(mu), z.shape[1], dtype=torch.float64)
    env = env.index_add(0, receiver, sense[:, :, None] * z[sender][:, None, :])
    energy = (env * torch.tensor(ge, dtype=torch.float64)).sum()
    gx, gz, gs = torch.autograd.grad(energy, [x, z, strain])
    return env.detach().numpy(), -gx.numpy(), gz.numpy(), -gs.numpy()


def error(ours, exact):
    return np.abs(ours - exact).max() / max(np.abs(exact).max(), 1e-30)


def run(where, table, z, ge, dtype, n_block, n_thread):
    n_recv = len(where.row_ptr) - 1
    n_feat = 0 if z is None else z.shape[1]
    env = np.full(ge.shape, np.nan, dtype)
    gradients = Gradients(len(where.x), n_feat, dtype, n_thread)
    for begin in range(0, n_recv, n_block):
        end = min(begin + n_block, n_recv)
        forward(where, table, z, env[begin:end], begin, n_thread)
        backward(where, table, z, ge[begin:end], gradients, begin)
    return env, *gradients.total()


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
        table = RadialTable.build(mu, sigma, rcut, dtype, reach)
        for n_block, n_thread in ((31, 1), (10, 2)):
            ours = run(where, table, z, ge, dtype, n_block, n_thread)
            errors = [error(a, b) for a, b in zip(ours, exact, strict=True)]
            assert max(errors) < TOLERANCE[dtype], errors


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
    env, forces, _, virial = run(where, table, None, ge, dtype, 10, 2)
    errors = [error(env, exact[0]), error(forces, exact[1]), error(virial, exact[3])]
    assert max(errors) < TOLERANCE[dtype], errors


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
    ours = run(where, RadialTable.build(mu, sigma, rcut), z, ge, np.float32, 31, 1)
    errors = [error(a, b) for a, b in zip(ours, exact, strict=True)]
    assert max(errors) < TOLERANCE[np.float32] * (20 if order == "narrow" else 1), errors


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
    first, second = (run(where, table, z, ge, np.float32, 16, 2) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_geometry_is_a_named_tuple():
    assert Geometry._fields[-1] == "species"
