"""The grid: PySCF's points and weights, their derivatives, what they integrate; basis functions."""

import nanodft_cases as cases
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.units import Bohr
from pyscf.dft import gen_grid, radi
from pyscf.grad import rks

from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.grid import Grid
from md_plugin.nanodft.orbitals import Orbitals

MOLECULES = ("H2O", "HCl", "C6H6", "SiH4")


def bohr(atoms):
    return torch.from_numpy(atoms.positions / Bohr)


def by_place(points, weights):
    """Rows (x, y, z, weight) in an order that roundings do not change."""
    points, weights = np.asarray(points), np.asarray(weights)
    return np.column_stack([points, weights])[np.lexsort((points.round(6) + 0.0).T)]


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 8, 10, 14, 17])
def test_points_around_an_atom_are_those_of_pyscf(number, level):
    grid = Grid.build([number], level)
    atom = cases.mole(Atoms([number]), "sto-3g", charge=number % 2)
    ((points, volumes),) = gen_grid.gen_atomic_grids(
        atom, level=level, radi_method=radi.treutler_ahlrichs, prune=gen_grid.nwchem_prune
    ).values()
    expected = by_place(points, volumes)
    np.testing.assert_allclose(by_place(grid.offset, grid.volume), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", MOLECULES)
def test_weights_are_those_of_pyscf(name, level):
    atoms = cases.displaced(name)
    grid, system = Grid.build(atoms.numbers, level), cases.mole(atoms)
    free = {
        system.atom_symbol(k): (grid.offset[grid.owner == k].numpy(), grid.volume[grid.owner == k])
        for k in range(len(atoms))
    }
    free = {symbol: (points, volumes.numpy()) for symbol, (points, volumes) in free.items()}
    adjust = radi.treutler_atomic_radii_adjust
    points, weights = gen_grid.get_partition(system, free, radii_adjust=adjust)
    x = bohr(atoms)
    np.testing.assert_allclose(grid.points(x), points, rtol=0, atol=1e-13)
    # relative to the weight of the point in the free atom, which is what is partitioned
    share = (grid.weights(x) - torch.from_numpy(weights)) / grid.volume
    assert share.abs().max() < 1e-13
    chunks = torch.cat([part.weights(x) for part in grid.chunks(777)])
    torch.testing.assert_close(chunks, grid.weights(x), rtol=1e-14, atol=0)


def test_derivatives_of_weights_are_those_of_pyscf():
    atoms = cases.displaced("NH3")
    field = cases.mean_field(atoms, "svwn", "sto-3g", level=0)
    field.grids.level = 0
    factor, total, expected = torch.linspace(0.5, 2.0, 4), 0.0, np.zeros((4, 3))
    for k, (_, weights, slopes) in enumerate(rks.grids_response_cc(field.grids)):
        total += float(factor[k]) * weights.sum()
        expected += float(factor[k]) * slopes.sum(-1)
    grid, x = Grid.build(atoms.numbers, 0), bohr(atoms).requires_grad_()
    value = (grid.weights(x) * factor[grid.owner]).sum()
    value.backward()
    assert value.item() == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(x.grad, expected, rtol=0, atol=1e-9 * abs(expected).max())
    assert abs(expected).max() > 1


def test_weights_pass_gradcheck():
    grid = next(Grid.build([8, 1, 1], 0).chunks(40))
    x = bohr(cases.displaced("H2O")).requires_grad_()
    assert torch.autograd.gradcheck(grid.weights, (x,))


def test_one_atom_has_all_of_each_point():
    grid = Grid.build([7], 0)
    assert torch.equal(grid.weights(torch.zeros(1, 3, dtype=torch.float64)), grid.volume)


@pytest.mark.parametrize("name", MOLECULES)
def test_integral_of_gaussians(name):
    atoms = cases.displaced(name)
    x, grid = bohr(atoms), Grid.build(atoms.numbers, 3)
    distance = (grid.points(x)[:, None] - x).norm(dim=-1)
    integral = grid.weights(x) @ (-0.8 * distance.square()).exp().sum(1)
    assert float(integral) == pytest.approx(len(atoms) * (np.pi / 0.8) ** 1.5, rel=2e-6)


@pytest.mark.parametrize("level", [-1, 10, 2.5, "3", None])
def test_unknown_levels(level):
    with pytest.raises(ValueError, match="grid_level must be an integer from 0 to 9, got"):
        Grid.build([1, 1], level)


@pytest.mark.parametrize("basis", ["sto-3g", "6-31g"])
@pytest.mark.parametrize("name", ["HCl", "CH4"])
def test_basis_functions_and_derivatives_are_those_of_pyscf(name, basis):
    atoms = cases.displaced(name)
    orbitals, x = Orbitals.of(Basis.build(atoms.numbers, basis)), bohr(atoms)
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(200, 3, dtype=torch.float64, generator=generator)
    expected = cases.mole(atoms, basis).eval_gto("GTOval_sph_deriv2", points.numpy())
    values = orbitals.at(points, x, derivatives=2)
    np.testing.assert_allclose(values.chi, expected[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(values.gradient, expected[1:4], rtol=0, atol=1e-13)
    hessian = expected[4:][[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3, *expected[0].shape)
    of_chi = torch.randn(values.chi.shape, dtype=torch.float64, generator=generator)
    of_gradient = torch.randn(values.gradient.shape, dtype=torch.float64, generator=generator)
    pull = of_chi.numpy() * expected[1:4]
    np.testing.assert_allclose(values.pull(of_chi, None), pull, rtol=0, atol=1e-12)
    pull = pull + np.einsum("jga,jkga->kga", of_gradient.numpy(), hessian)
    np.testing.assert_allclose(values.pull(of_chi, of_gradient), pull, rtol=0, atol=1e-12)
