"""Functionals: libxc's numbers, derivatives against differences, limits, vanishing densities."""

import math

import nanodft_cases as cases
import numpy as np
import pytest
import torch
from pyscf.dft import libxc

from md_plugin.nanodft.functionals import METHODS, MIN_DENSITY, b88, get_functional, slater

FUNCTIONALS = [name for name, method in METHODS.items() if method.density_functional is not None]


def densities(n=400):
    """Densities of eleven orders of magnitude with all gradients that molecules have."""
    generator = np.random.default_rng(0)
    rho = 10 ** generator.uniform(-9, 2, n)
    sigma = rho ** (8 / 3) * 10 ** generator.uniform(-6, 3, n)
    return torch.from_numpy(rho), torch.from_numpy(sigma)


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_values_and_derivatives_are_those_of_libxc(name):
    rho, sigma = densities()
    method = METHODS[name]
    e, vrho, vsigma = method.evaluate(rho, sigma)
    rows = np.stack([rho, sigma.sqrt(), 0 * rho, 0 * rho]) if method.gradient else rho.numpy()
    per_electron, slopes = libxc.eval_xc(cases.PYSCF_XC[name], rows, deriv=1)[:2]
    np.testing.assert_allclose(e, per_electron * rho.numpy(), rtol=1e-12)
    np.testing.assert_allclose(vrho, slopes[0], rtol=1e-12)
    if method.gradient:
        np.testing.assert_allclose(vsigma, slopes[1], rtol=1e-11)
    else:
        assert not vsigma.any()


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_derivatives_are_those_of_the_energy(name):
    rho, sigma = densities(60)
    method, h = METHODS[name], 1e-4
    e, vrho, vsigma = method.evaluate(rho, sigma)
    for k, slope in ((0, vrho), (1, vsigma)):
        if k == 1 and not method.gradient:
            continue
        sides = []
        for sign in (1, -1):
            moved = [rho, sigma]
            moved[k] = moved[k] * (1 + sign * h)
            sides.append(method.evaluate(*moved)[0])
        difference = (sides[0] - sides[1]) / (2 * h * (rho, sigma)[k])
        error = (difference - slope).abs() * (rho, sigma)[k]
        assert (error < 1e-6 * e.abs()).all()


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_vanishing_densities_give_zeros(name):
    rho = torch.tensor([0.0, 1e-300, MIN_DENSITY / 2, -1e-20, 1e-10, 1.0], dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.0, 1e-30, 0.0, 0.0, 0.0], dtype=torch.float64)
    for value in METHODS[name].evaluate(rho, sigma):
        assert value.isfinite().all()
        assert not value[:4].any()
    assert (METHODS[name].evaluate(rho, sigma)[0][4:] < 0).all()


def test_exchange_of_the_uniform_gas():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert slater(one)[0].item() == pytest.approx(-0.75 * (3 / math.pi) ** (1 / 3), rel=1e-15)
    assert b88(one, zero)[0].item() == 0.0


def test_exact_exchange_and_names():
    assert {name: method.hyb for name, method in METHODS.items()} == {
        "hf": 1.0,
        "svwn": 0.0,
        "b3lyp": 0.2,
        "b3lyp5": 0.2,
    }
    assert get_functional("B3LYP") is METHODS["b3lyp"]
    for name in ("pbe", "", None, 3):
        with pytest.raises(ValueError, match="is not known; choose hf, svwn, b3lyp, b3lyp5"):
            get_functional(name)


def test_the_two_b3lyp_differ():
    """VWN's two fits: about 8 mHa in an atom's core, enough to tell which one was used."""
    rho, sigma = densities()
    a, b = (METHODS[name].evaluate(rho, sigma)[0] for name in ("b3lyp", "b3lyp5"))
    assert ((a - b) / rho).abs().max() > 1e-3
