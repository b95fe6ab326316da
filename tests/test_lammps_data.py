"""The data objects of all hosts, without LAMMPS: numpy stand-ins with LAMMPS's own manners."""

import ctypes

import numpy as np
import pytest
import torch

from lammps_interface import faults
from lammps_interface.couplings import coupling_of
from lammps_interface.exchange import LammpsHalo
from lammps_interface.lammps_data import read_step
from lammps_interface.mliap import HipnnMLIAP
from lammps_interface.plugin_data import PluginData
from lammps_interface.view import View, view_at
from md_plugin.checkpoint import model_bytes
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import neighbour_pairs
from md_plugin.potential import Potential, Structure

CELL = np.diag([9.0, 8.0, 7.5])
RCUT = 4.4


class PlainData:
    """LAMMPS's plain ML-IAP data object: numpy arrays, and an exception for each empty one."""

    def __init__(self, structure, rows=None):
        x, owner = ghosts(structure)
        self.n, self.owner, self.positions = len(structure.species), owner, x
        self.rows = np.arange(self.n) if rows is None else rows
        self.natomneigh = self.nlistatoms = len(self.rows)
        self.ntotal = len(x)
        self._elems = np.searchsorted([73, 74], structure.species)[owner].astype(np.int32)
        d = x[None] - x[:, None]
        r = np.linalg.norm(d, axis=2)
        pairs = [(i, j) for i in self.rows for j in np.flatnonzero((r[i] < RCUT) & (r[i] > 0))]
        inside = np.isin(self.owner, self.rows)
        self._pairs = np.array([(i, j) for i, j in pairs if inside[j]], dtype=np.int32)
        self.npairs = len(self._pairs)
        self._d = d
        self.f = np.zeros((self.ntotal, 3))
        self.energy = None

    def _array(self, array):
        if not len(array):
            raise ValueError("Invalid shape in axis 0: 0.")
        return array

    @property
    def iatoms(self):
        return self._array(np.array(self.rows, np.int32))

    @property
    def elems(self):
        return self._array(self._elems)

    @property
    def pair_i(self):
        return self._array(self._pairs)[:, 0]

    @property
    def pair_j(self):
        return self._array(self._pairs)[:, 1]

    @property
    def rij(self):
        return self._array(self._d[self.pair_i, self.pair_j])

    def update_pair_forces(self, fij):
        assert fij.dtype == np.float64
        assert fij.flags.c_contiguous
        np.add.at(self.f, self.pair_i, fij)
        np.add.at(self.f, self.pair_j, -fij)

    def folded_forces(self):
        """Forces with those of ghosts sent to their owners."""
        forces = np.zeros((self.n, 3))
        np.add.at(forces, self.owner, self.f)
        return forces


class ExchangingData(PlainData):
    """Adds the exchange, as mliap/py does; `list_count` is how that host is recognised."""

    list_count = 1
    want_centroid = want_std = False
    vatom = None
    has_null = True  # another pair style may handle some types: the way over pairs, not positions

    @property
    def nlocal(self):
        return self.n

    def forward_exchange(self, copy_from, copy_to, vec_len):
        assert copy_from.is_contiguous()
        assert copy_from.shape == (self.ntotal, vec_len)
        copy_to[:] = copy_from[torch.as_tensor(self.owner)]

    def reverse_exchange(self, copy_from, copy_to, vec_len):
        ghosts = copy_from[self.n :].clone()
        copy_to[:] = copy_from
        copy_to.index_add_(0, torch.as_tensor(self.owner[self.n :]), ghosts)


def ghosts(structure):
    """Atoms and all images within RCUT of one: positions and owners, local atoms first."""
    x, owner = [structure.positions], [np.arange(len(structure.species))]
    for shift in np.ndindex(3, 3, 3):
        t = (np.array(shift) - 1) @ structure.cell
        if np.any(t) and len(structure.species):
            image = structure.positions + t
            near = np.linalg.norm(image[:, None] - structure.positions, axis=2).min(1) < RCUT
            x.append(image[near])
            owner.append(np.flatnonzero(near))
    return np.concatenate(x), np.concatenate(owner)


def structure(n=9):
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(range(3), range(2), range(2), indexing="ij"), -1).reshape(-1, 3)
    x = grid[:n] * 2.9 + rng.uniform(-0.2, 0.2, (n, 3))
    return Structure(rng.choice([73, 74], n), x, CELL, np.array([True] * 3))


def potential(n_interactions):
    torch.manual_seed(2)
    config = HipnnConfig(
        species=(73, 74),
        n_feat=5,
        n_nu=4,
        n_interactions=n_interactions,
        n_atom_layers=1,
        rcut=RCUT,
        r_min=2.0,
        r_max=4.0,
    )
    return Potential(Hipnn(config), dtype="float64")


def evaluate(model, data):
    unified = HipnnMLIAP(model_bytes(model), dtype="float64", device="cpu")
    unified.compute_descriptors(data)
    unified.compute_gradients(data)
    unified.compute_forces(data)


@pytest.mark.parametrize(
    ("kind", "n_interactions"), [(PlainData, 1), (ExchangingData, 1), (ExchangingData, 3)]
)
def test_hosts_equal_python(kind, n_interactions):
    crystal, model = structure(), potential(n_interactions)
    data = kind(crystal)
    evaluate(model, data)
    expected = model.evaluate(crystal)
    assert data.energy == pytest.approx(float(expected.energy[0]), rel=1e-12)
    np.testing.assert_allclose(data.eatoms, expected.atom_energy.numpy(), rtol=1e-12)
    np.testing.assert_allclose(data.folded_forces(), expected.forces.numpy(), atol=1e-12)


class KokkosHostData(PlainData):
    """As KOKKOS on a CPU hands it over: an exchange, and `eatoms` that can only be written into."""

    __module__ = "mliap_unified_couple_kokkos"
    forward_exchange = ExchangingData.forward_exchange
    reverse_exchange = ExchangingData.reverse_exchange
    nlocal = ExchangingData.nlocal

    def __init__(self, structure):
        super().__init__(structure)
        self._eatoms = np.zeros(self.n)

    @property
    def eatoms(self):
        return self._array(self._eatoms)


def test_kokkos_on_a_cpu_runs_one_layer_and_refuses_more():
    crystal, model = structure(), potential(1)
    data = KokkosHostData(crystal)
    assert coupling_of(data) == faults.KOKKOS_HOST
    evaluate(model, data)
    expected = model.evaluate(crystal)
    np.testing.assert_allclose(data.eatoms, expected.atom_energy.numpy(), rtol=1e-12)
    np.testing.assert_allclose(data.folded_forces(), expected.forces.numpy(), atol=1e-12)
    with pytest.raises(ValueError, match=r"overruns its buffers.*lmp -sf py"):
        evaluate(potential(2), KokkosHostData(crystal))


class CudaData(ExchangingData):
    """As KOKKOS hands it over: arrays on the GPU."""

    def __init__(self, structure, rows=None):
        super().__init__(structure, rows)
        self.f = torch.zeros(self.ntotal, 3, dtype=torch.float64, device="cuda")
        self.eatoms = torch.zeros(self.n, dtype=torch.float64, device="cuda")
        self.owner_on_gpu = torch.as_tensor(self.owner, device="cuda")

    def _array(self, array):
        return torch.as_tensor(super()._array(array), device="cuda")

    @property
    def rij(self):
        i, j = self._pairs.T
        return self._array(self._d[i, j])

    def update_pair_forces(self, fij):
        assert fij.is_cuda
        self.f.index_add_(0, self.pair_i.long(), fij)
        self.f.index_add_(0, self.pair_j.long(), -fij)

    def forward_exchange(self, copy_from, copy_to, vec_len):
        copy_to[:] = copy_from[self.owner_on_gpu]

    def reverse_exchange(self, copy_from, copy_to, vec_len):
        ghosts = copy_from[self.n :].clone()
        copy_to[:] = copy_from
        copy_to.index_add_(0, self.owner_on_gpu[self.n :], ghosts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_arrays_on_the_gpu():
    crystal, model = structure(), potential(2)
    data = CudaData(crystal)
    unified = HipnnMLIAP(model_bytes(model), dtype="float64")
    unified.compute_forces(data)
    expected = model.evaluate(crystal)
    assert data.energy == pytest.approx(float(expected.energy[0]), rel=1e-10)
    forces = torch.zeros(data.n, 3, dtype=torch.float64, device="cuda")
    forces.index_add_(0, data.owner_on_gpu, data.f)
    np.testing.assert_allclose(forces.cpu().numpy(), expected.forces.numpy(), atol=1e-10)


def test_rows_that_are_a_subset_are_renumbered():
    crystal, model = structure(), potential(2)
    rows = np.array([7, 1, 2, 5, 8])
    part = Structure(crystal.species[rows], crystal.positions[rows], CELL, crystal.pbc)
    data = ExchangingData(crystal, rows)
    data._elems[~np.isin(data.owner, rows)] = -1
    evaluate(model, data)
    expected = model.evaluate(part)
    assert data.energy == pytest.approx(float(expected.energy[0]), rel=1e-12)
    np.testing.assert_allclose(data.folded_forces()[rows], expected.forces.numpy(), atol=1e-12)


def test_pairs_with_atoms_outside_the_rows_are_refused():
    data = ExchangingData(structure(), np.array([1, 2, 5]))
    data._pairs[0, 1] = 8
    with pytest.raises(ValueError, match="does not handle"):
        read_step(data)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("kind", [PlainData, ExchangingData])
def test_no_atoms_and_no_pairs(n, kind):
    model = potential(1 if kind is PlainData else 2)
    alone = Structure(
        np.array([74] * n, int), np.ones((n, 3)), np.eye(3) * 50, np.array([True] * 3)
    )
    data = kind(alone)
    evaluate(model, data)
    assert data.energy == pytest.approx(float(model.evaluate(alone).energy[0]) if n else 0.0)
    assert not data.f.any()


def test_plain_mliap_refuses_layers_that_exchange():
    assert coupling_of(PlainData(structure())) == faults.PLAIN
    with pytest.raises(ValueError, match=r"2 interaction layers.*lmp -sf py"):
        evaluate(potential(2), PlainData(structure()))


def test_halo_is_the_adjoint_of_itself():
    data = ExchangingData(structure())
    for order in (None, torch.arange(data.ntotal)):
        halo = LammpsHalo(data, data.n, torch.device("cpu"), order)
        z = torch.randn(data.n, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(halo.fill, z)
        filled = halo.fill(z)
        assert filled.shape == (data.ntotal, 4)
        # gradients that are not contiguous must not be read as if they were
        y = torch.randn(4, data.ntotal, dtype=torch.float64).T
        (gradient,) = torch.autograd.grad(filled, z, y)
        expected = torch.zeros_like(z).index_add(0, torch.as_tensor(data.owner), y)
        torch.testing.assert_close(gradient, expected)


def test_neighbours_are_those_of_python():
    crystal = structure()
    pairs, _ = neighbour_pairs(crystal.positions, CELL, True, RCUT)
    step = read_step(PlainData(crystal))
    assert step.pairs.row_ptr.tolist() == pairs.row_ptr.tolist()


def test_layout_of_the_view_is_checked():
    view = View(struct_size=8)
    with pytest.raises(RuntimeError, match="different versions"):
        view_at(ctypes.addressof(view))


def test_exchange_arguments_are_checked():
    view = View(struct_size=ctypes.sizeof(View), ntotal=2, comm_width=4, units=b"metal")
    data = PluginData(view, elements=["Ta"], ndescriptors=1, nparams=1)
    data.begin_step()
    rows = torch.zeros(2, 3)
    bad = [
        (rows.T.contiguous().T, rows, ValueError, "contiguous"),
        (rows.to(torch.int32), rows, TypeError, "float32 and float64"),
        (rows.double(), rows, TypeError, "copy_from is float64 but copy_to is float32"),
        (torch.zeros(5, 3), rows, ValueError, "one row for each"),
        ([0.0] * 6, rows, TypeError, "numpy array or a torch tensor"),
        (rows.to("meta"), rows, TypeError, "on meta"),
    ]
    for source, target, error, text in bad:
        with pytest.raises(error, match=text):
            data.forward_exchange(source, target, 3)
