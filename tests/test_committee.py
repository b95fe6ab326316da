"""Several models as one: means, spread, and members that do not fit together."""

import numpy as np
import pytest
import torch
from ase.build import bulk
from test_lammps_model import make_potential

from lammps_interface import export_mliap
from md_plugin import HipnnCalculator
from md_plugin.checkpoint import load_model, save_model
from md_plugin.cli import main
from md_plugin.committee import Committee, energy_std, force_std
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential


def members():
    return [make_potential(n_interactions=k, seed=30 + k) for k in (1, 2, 3)]


@pytest.fixture
def crystal():
    atoms = bulk("W", cubic=True) * (2, 2, 2)
    atoms.numbers[::3] = 73
    atoms.rattle(0.1, seed=3)
    return atoms


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{k}.hipnn" for k in range(3)]
    for path, member in zip(paths, members(), strict=True):
        save_model(path, member)
    return paths


def test_ase_results_are_the_means_of_the_members(crystal, files):
    each = []
    for path in files:
        crystal.calc = HipnnCalculator(path, dtype="float64")
        each.append({name: crystal.calc.get_property(name, crystal) for name in NAMES})
    crystal.calc = HipnnCalculator(files, dtype="float64")
    for name in NAMES:
        mean = np.mean([one[name] for one in each], axis=0)
        found = crystal.calc.get_property(name, crystal)
        np.testing.assert_allclose(found, mean, rtol=1e-10, atol=1e-10)
    forces = np.array([one["forces"] for one in each])
    spread = np.sqrt(((forces - forces.mean(0)) ** 2).sum(axis=2).mean(axis=0))
    np.testing.assert_allclose(crystal.calc.results["forces_std"], spread, rtol=1e-10)
    energies = np.array([one["energies"] for one in each])
    np.testing.assert_allclose(crystal.calc.results["energies_std"], energies.std(0), rtol=1e-10)
    assert spread.min() > 1e-3  # the members really differ


NAMES = ("energy", "energies", "forces", "stress", "stresses")


def test_energies_alone_have_a_spread_too(crystal, files):
    crystal.calc = HipnnCalculator(files, dtype="float64")
    crystal.get_potential_energy()
    assert len(crystal.calc.results["energies_std"]) == len(crystal)
    single = HipnnCalculator(files[0])
    single.calculate(crystal, ["forces"])
    assert "energies_std" not in single.results


def test_spread_of_known_numbers():
    forces = torch.tensor([[[1.0, 0, 0]], [[-1.0, 0, 0]]], dtype=torch.float64)
    assert force_std(forces).tolist() == [1.0]
    assert energy_std(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist() == [1.0, 0.0]
    assert force_std(forces[:, :0]).shape == (0,)


def test_a_list_of_one_is_no_committee(files):
    assert not isinstance(load_model(files[:1]), Committee)
    committee = load_model(files, dtype="float64")
    assert isinstance(committee, Committee)
    assert repr(committee).startswith("Committee of 3")
    assert load_model(committee) is committee


def test_members_that_do_not_fit_together():
    first = make_potential()
    other = Potential(Hipnn(HipnnConfig(species=(73,), n_feat=3, n_nu=3)), dtype="float64")
    with pytest.raises(ValueError, match=r"same species: \(73, 74\) in the first, \(73,\) in numb"):
        Committee([first, other])
    with pytest.raises(ValueError, match="same dtype: float64 in the first, mixed in number 3"):
        Committee([first, make_potential(), make_potential("mixed")])
    with pytest.raises(ValueError, match="at least two models, got 1"):
        Committee([first])


def test_a_committee_is_not_trained(crystal):
    batch_of = load_model(members())
    with pytest.raises(ValueError, match="train its members"):
        batch_of.evaluate_pairs(torch.zeros(0), None, torch.zeros(0, 3), create_graph=True)


def test_a_file_holds_one_model(tmp_path):
    with pytest.raises(ValueError, match="save the members of a committee each"):
        save_model(tmp_path / "all.hipnn", load_model(members()))


def test_export_of_several_models(files, tmp_path, capsys):
    assert main(["export", *map(str, files), "-o", str(tmp_path / "three.pt")]) == 0
    unified = torch.load(tmp_path / "three.pt", weights_only=False)
    assert unified.n_models == 3
    assert unified.comm_width >= 9
    assert isinstance(unified.potential, Committee)
    export_mliap(load_model(files, dtype="float64"), tmp_path / "again.pt")
    assert torch.load(tmp_path / "again.pt", weights_only=False).n_models == 3
