"""Reading labelled structures: what comes back, and what each bad file is told."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from md_plugin.data import (
    DataError,
    Keys,
    closest_distance,
    fit_reference_energies,
    label_batches,
    minibatches,
    read_dataset,
)


def labelled(seed=0, n=2, stress=True):
    atoms = bulk("Al", cubic=True).repeat((n, 1, 1))
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if stress:
        labels["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def test_what_is_written_comes_back(tmp_path):
    frames = [labelled(0), labelled(1, n=1, stress=False)]
    frames[0].info["config_type"] = "solid"
    write(tmp_path / "d.xyz", frames)
    d = read_dataset(tmp_path / "d.xyz")
    assert len(d) == 2 and d.species == (13,) and d.config_type == ["solid", ""]
    assert d.n_atoms.tolist() == [8, 4]
    np.testing.assert_allclose(d.energy[0], frames[0].get_potential_energy(), atol=1e-7)
    np.testing.assert_allclose(d.forces[1], frames[1].get_forces(), atol=1e-7)
    np.testing.assert_allclose(d.stress[0], frames[0].get_stress(voigt=False), atol=1e-7)
    assert np.isnan(d.stress[1]).all()
    parts = label_batches(d, 5.0)
    volume = frames[0].get_volume()
    np.testing.assert_allclose(parts[0].virial[0], -volume * d.stress[0])
    assert torch.isnan(parts[1].virial).all()


def test_voigt_order(tmp_path):
    atoms = labelled(stress=False)
    atoms.info["my_stress"] = np.arange(6.0)
    write(tmp_path / "d.xyz", [atoms])
    d = read_dataset(tmp_path / "d.xyz", Keys(stress="my_stress"))
    assert d.stress[0].tolist() == [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


def test_other_keys(tmp_path):
    atoms = labelled()
    atoms.info["dft_energy"], atoms.arrays["dft_forces"] = -1.5, np.ones((8, 3))
    atoms.calc = None
    write(tmp_path / "d.xyz", [atoms])
    d = read_dataset(tmp_path / "d.xyz", Keys("dft_energy", "dft_forces"))
    assert d.energy.tolist() == [-1.5] and (d.forces[0] == 1).all()


def change(**info):
    atoms = labelled()
    atoms.calc.results.update(info)
    return {k: v for k, v in atoms.calc.results.items() if v is not None}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (change(energy=None), r"d.xyz, frame 1: no energy under the key 'energy'.*energy_key"),
        (change(forces=None), r"d.xyz, frame 1: no forces under the key 'forces'"),
        (change(energy=np.nan), r"d.xyz, frame 1: 'energy' is not finite"),
        (change(forces=np.full((8, 3), np.inf)), r"d.xyz, frame 1: 'forces' is not finite"),
        (change(stress=np.full(6, np.nan)), r"d.xyz, frame 1: 'stress' is not finite"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    bad = labelled()
    bad.calc = SinglePointCalculator(bad, **labels)
    write(tmp_path / "d.xyz", [labelled(), bad])
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "d.xyz")


def test_wrong_shapes(tmp_path):
    atoms = labelled()
    atoms.info["e"], atoms.info["s"] = [1.0, 2.0], [1.0, 2.0]
    write(tmp_path / "d.xyz", [atoms])
    with pytest.raises(DataError, match=r"frame 0: 'e' has shape \(2,\), but energy must have"):
        read_dataset(tmp_path / "d.xyz", Keys(energy="e"))
    with pytest.raises(DataError, match=r"frame 0: 's' has shape \(2,\), but stress must have"):
        read_dataset(tmp_path / "d.xyz", Keys(stress="s"))


def test_stress_of_a_molecule(tmp_path):
    atoms = labelled()
    atoms.pbc = [True, True, False]
    write(tmp_path / "d.xyz", [atoms])
    with pytest.raises(DataError, match="frame 0: 'stress' is given, but the cell is not periodic"):
        read_dataset(tmp_path / "d.xyz")


def test_unusable_files(tmp_path):
    with pytest.raises(DataError, match=r"none.xyz does not exist"):
        read_dataset(tmp_path / "none.xyz")
    (tmp_path / "text.xyz").write_text("not a structure\n")
    with pytest.raises(DataError, match=r"text.xyz cannot be read"):
        read_dataset(tmp_path / "text.xyz")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(DataError, match=r"empty.xyz"):
        read_dataset(tmp_path / "empty.xyz")
    bad = labelled()
    bad.positions[3, 1] = np.nan
    write(tmp_path / "nan.xyz", [bad])
    with pytest.raises(DataError, match=r"nan.xyz, frame 0: positions are not finite"):
        read_dataset(tmp_path / "nan.xyz")


def test_flat_cell_names_the_frame(tmp_path):
    bad = labelled()
    bad.cell[2] = bad.cell[1]
    write(tmp_path / "d.xyz", [labelled(), bad])
    with pytest.raises(DataError, match=r"d.xyz, frame 1: .*coplanar"):
        label_batches(read_dataset(tmp_path / "d.xyz"), 4.0)


def test_minibatches_hold_everything_once(tmp_path):
    write(tmp_path / "d.xyz", [labelled(k, n=1 + k % 3) for k in range(10)])
    parts = label_batches(read_dataset(tmp_path / "d.xyz"), 4.0)
    for seed in (None, 0, 1):
        batches = list(minibatches(parts, 20, seed))
        assert all(b.forces.shape[0] <= 20 for b in batches)
        energies = torch.cat([b.energy for b in batches])
        assert torch.equal(energies.sort()[0], torch.cat([p.energy for p in parts]).sort()[0])
        joined = next(b for b in batches if b.batch.n_structures > 1)
        assert joined.batch.pairs.n_recv == joined.forces.shape[0]
    first, again, other = (list(minibatches(parts, 20, s)) for s in (0, 0, 1))
    assert torch.equal(first[0].energy, again[0].energy)
    assert any(not torch.equal(a.energy, b.energy) for a, b in zip(first, other, strict=False))
    # A structure larger than the limit gets a batch of its own.
    assert len(list(minibatches(parts, 1))) == 10


def test_closest_distance(tmp_path):
    atoms = Atoms("Al2", [[0, 0, 0], [0, 0, 1.75]])
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((2, 3)))
    write(tmp_path / "d.xyz", [labelled(), atoms])
    parts = label_batches(read_dataset(tmp_path / "d.xyz"), 4.0)
    assert closest_distance(parts) == pytest.approx(1.75)
    assert closest_distance([]) is None


def test_reference_energies(tmp_path):
    def molecule(symbols, energy):
        n = len(Atoms(symbols))
        atoms = Atoms(symbols, np.arange(3.0 * n).reshape(n, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((n, 3)))
        return atoms

    mixed = [molecule("H2", -2.0), molecule("OH2", -12.0), molecule("O2", -20.0)]
    write(tmp_path / "fit.xyz", mixed)
    fit = fit_reference_energies(read_dataset(tmp_path / "fit.xyz"))
    assert fit == pytest.approx({1: -1.0, 8: -10.0})
    # An isolated atom is taken at its word, and the rest is fitted around it.
    write(tmp_path / "atom.xyz", [molecule("H", -0.5), molecule("OH2", -12.0)])
    fit = fit_reference_energies(read_dataset(tmp_path / "atom.xyz"))
    assert fit == pytest.approx({1: -0.5, 8: -11.0})
