"""Which coupling may run which model, and what a rank does about its GPU and its faults."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lammps_helpers import environment
from test_lammps_data import ExchangingData, PlainData, evaluate, potential, structure

from lammps_interface import couplings, faults, native, ranks
from lammps_interface.couplings import Coupling, check_table, predicted_table
from lammps_interface.exchange import check_exchange
from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import model_bytes
from md_plugin.devices import choose_device


def lammps(version=20260704, **changes):
    """Stands for `native.Native`."""
    known = {"skin": 2.0, "comm_cutoff": 10.8, "volume": 540.0, "n_atoms": 9, "n_ranks": 1}
    return SimpleNamespace(version=version, **(known | changes))


# faults


@pytest.mark.parametrize(
    ("kind", "needs", "version", "text"),
    [
        (faults.KOKKOS, faults.EXCHANGE, 20250722, "use 15 Dec 2025 or later"),
        (faults.KOKKOS_HOST, faults.EXCHANGE, 20260704, "overruns its buffers"),
        (faults.KOKKOS_HOST, faults.EXCHANGE, None, "this LAMMPS overruns its buffers"),
        (faults.PLAIN, faults.GHOSTNEIGH, 20250722, "use 4 Jul 2026 or later"),
        (faults.KOKKOS, faults.GHOSTNEIGH, 20260704, "write 0 behind the file name"),
    ],
)
def test_known_faults_are_refused_with_a_remedy(kind, needs, version, text):
    with pytest.raises(ValueError, match=text):
        faults.check(kind, {needs}, version)
    faults.check(kind, set(), version)
    faults.check(faults.PLUGIN, {needs}, version)


def test_faults_end_with_the_version_that_mends_them():
    assert not faults.check(faults.PLAIN, {faults.GHOSTNEIGH}, 20260704)
    told = faults.check(faults.KOKKOS, {faults.EXCHANGE}, 20260704)
    assert ["5132" in fault.source for fault in told] == [True]
    assert not faults.check(faults.KOKKOS, {faults.EXCHANGE}, 20260901)
    assert len(faults.known_faults(20250722)) > len(faults.known_faults(20260704))
    assert all(fault.remedy and fault.source for fault in faults.FAULTS)


# layers on ghosts under plain ML-IAP


def test_layers_on_ghosts_need_a_lammps_that_computes_them_right():
    with pytest.raises(ValueError, match="LAMMPS 20250722 gave wrong forces with ghostneigh 1"):
        Coupling(faults.PLAIN, 1, 4.4, lammps(20250722))
    Coupling(faults.PLAIN, 0, 4.4, lammps(20250722))


@pytest.mark.parametrize(
    ("native", "natomneigh", "text"),
    [
        (lammps(), 9, r"FILE 1'\) and write 'comm_modify cutoff 10.8'.*lmp -sf py.*-sf kk"),
        (None, 9, "'comm_modify cutoff' with 8.8 plus the skin"),
        (lammps(comm_cutoff=9.0), 20, "up to 10.8 away.*known up to 9: write 'comm_modify cutoff"),
        (lammps(comm_cutoff=None), 20, "does not tell its communication cutoff"),
        (None, 20, "BUILD_SHARED_LIBS=ON"),
    ],
)
def test_layers_on_ghosts_need_enough_ghosts(native, natomneigh, text):
    coupling = Coupling(faults.PLAIN, 1, 4.4, native)
    data = SimpleNamespace(natomneigh=natomneigh, nlistatoms=9)
    with pytest.raises(ValueError, match=text):
        coupling.check_step(data, has_ghosts=True)
    coupling.check_step(data, has_ghosts=False)
    Coupling(faults.PLAIN, 0, 4.4, native).check_step(data, has_ghosts=True)
    Coupling(faults.PLUGIN, 1, 4.4, native).check_step(data, has_ghosts=True)


def test_enough_ghosts_pass():
    data = SimpleNamespace(natomneigh=20, nlistatoms=9)
    Coupling(faults.PLAIN, 1, 4.4, lammps()).check_step(data, has_ghosts=True)


# the table of plain ML-IAP


def test_table_of_plain_mliap_is_predicted():
    # 2,048 atoms of aluminium, two layers, cutoff 6.5 Å: LAMMPS asked for 40,914,322,560 bytes
    aluminium = lammps(n_atoms=2048, volume=2048 / 0.0603)
    assert predicted_table(aluminium, 6.5, 1) == pytest.approx(4.1e10, rel=0.2)
    one_layer = predicted_table(aluminium, 6.5, 0)
    assert one_layer == pytest.approx(4 * 2048**2 * 0.0603 * 4.18879 * 6.5**3, rel=1e-4)
    assert predicted_table(lammps(volume=None), 6.5, 1) == 0.0
    assert predicted_table(lammps(n_atoms=0), 6.5, 1) == 0.0


def test_table_of_plain_mliap_is_refused_where_it_does_not_fit(monkeypatch):
    large = lammps(n_atoms=2048, volume=2048 / 0.0603)
    monkeypatch.setattr(couplings, "available_memory", lambda: 10**10)
    with pytest.raises(ValueError, match=r"about 4\d GB on each rank for 2048 atoms, where 10 GB"):
        check_table(large, 6.5, 1)
    check_table(large, 6.5, 0)
    monkeypatch.setattr(couplings, "available_memory", lambda: None)
    check_table(large, 6.5, 1)


def test_available_memory_is_a_number_here():
    assert couplings.available_memory() > 2**20


# the LAMMPS behind an object


def test_objects_that_are_not_lammps_have_none():
    unified = HipnnMLIAP(model_bytes(potential(1)))
    assert native.behind(object(), unified) is None
    strange = type("MLIAPUnifiedInterface", (), {"__module__": "mliap_unified_couple"})()
    assert native.behind(strange, unified) is None
    unified.interface = strange
    assert unified.interface is strange


def test_memory_that_is_not_there_is_no_crash():
    assert native._read(0, 4) == ()
    assert native._read(8, 4) == ()
    assert native._read(2**63, 4) == ()
    assert len(native._read(id(native), 4)) == 4
    assert not native.Native(None, 8).is_consistent()


# devices


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def test_ranks_take_gpus_in_turn(three_gpus):
    for asked in ("auto", "cuda"):
        devices = [str(ranks.device_of_rank(asked, rank)) for rank in range(5)]
        assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert str(ranks.device_of_rank("cuda:2", 0)) == "cuda:2"
    assert str(ranks.device_of_rank("cpu", 4)) == "cpu"


def test_sharing_a_gpu_is_known(three_gpus):
    shared = [ranks.sharing(torch.device("cuda", k), "auto", 5) for k in range(3)]
    assert shared == [2, 2, 1]
    assert ranks.sharing(torch.device("cuda", 1), "cuda:1", 5) == 5
    assert ranks.sharing(torch.device("cpu"), "auto", 5) == 1


def test_a_gpu_that_is_not_there_is_an_error(three_gpus, monkeypatch):
    with pytest.raises(ValueError, match="torch sees 3 CUDA devices, numbered from 0"):
        choose_device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        ranks.device_of_rank("cuda", 0)
    assert str(ranks.device_of_rank("auto", 0)) == "cpu"


def test_local_rank_comes_from_the_launcher(monkeypatch):
    for name in ranks._LOCAL_RANK:
        monkeypatch.delenv(name, raising=False)
    assert ranks.local_rank(7) == 7
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert ranks.local_rank() == 3


def test_rows_fit_under_the_header():
    row = ranks.row(12, "cuda:1 (2 ranks)", "triton", "mixed", "checked", ("MPICH 5", 1))
    for name, value in (("device", "cuda:1"), ("backend", "triton"), ("exchange", "checked")):
        assert ranks.HEADER.index(name) == row.index(value)
    assert "GPU-aware" in row
    assert len(row) < 160


# the exchange, checked


class Swapped(ExchangingData):
    """Gives ghosts another atom's features."""

    def forward_exchange(self, copy_from, copy_to, vec_len):
        super().forward_exchange(copy_from, copy_to, vec_len)
        copy_to[self.n] = copy_to[self.n + 1]


class Confused(ExchangingData):
    """Gives what ghosts send back to the wrong owners."""

    def reverse_exchange(self, copy_from, copy_to, vec_len):
        super().reverse_exchange(copy_from, copy_to, vec_len)
        copy_to[: self.n] = copy_to[: self.n].roll(1, 0)


class Forgetful(ExchangingData):
    """Loses what one ghost sends back."""

    def reverse_exchange(self, copy_from, copy_to, vec_len):
        copy_from = copy_from.clone()
        copy_from[-1] = 0
        super().reverse_exchange(copy_from, copy_to, vec_len)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Swapped, "received another atom's values"), (Confused, "does not arrive at their owners")],
)
def test_a_broken_exchange_is_found_at_the_start(kind, text):
    good, data = ExchangingData(structure()), kind(structure())
    for each in (good, data):
        each.tag = each.owner + 1
    assert check_exchange(good, torch.device("cpu"), 3) == good.ntotal
    with pytest.raises(RuntimeError, match=text):
        check_exchange(data, torch.device("cpu"), 3)


def test_lost_ghosts_are_counted():
    data = Forgetful(structure())
    assert check_exchange(data, torch.device("cpu"), 3) == data.ntotal - 1


def test_ghost_rows_equal_python():
    """Plain ML-IAP with ghostneigh 1: ghosts near enough have rows of their own."""
    from test_lammps_data import CELL, Structure

    crystal, model = structure(), potential(2)
    images = [(np_shift - 1) @ CELL for np_shift in _shifts()]
    inner = [t for t in images if not t.any()]
    outer = [t for t in images if t.any()]
    x = torch.tensor(crystal.positions)
    everything = torch.cat([x + torch.tensor(t) for t in inner + outer]).numpy()
    species = crystal.species.tolist() * len(images)
    cluster = Structure(
        torch.tensor(species).numpy(), everything, CELL * 20, torch.zeros(3).bool().numpy()
    )
    data = PlainData(cluster)
    data.natomneigh, data.nlistatoms = len(everything), len(crystal.species)
    data.nlocal = data.nlistatoms
    unified = HipnnMLIAP(model_bytes(model), dtype="float64", device="cpu")
    unified._coupling = Coupling(faults.PLAIN, 1, 4.4, lammps(comm_cutoff=99.0))
    unified.compute_forces(data)
    expected = model.evaluate(crystal)
    assert data.energy == pytest.approx(float(expected.energy[0]), rel=1e-12)
    assert len(data.eatoms) == len(crystal.species)
    forces = data.f.reshape(len(images), -1, 3).sum(axis=0)
    assert abs(forces - expected.forces.numpy()).max() < 1e-12


def _shifts():
    import numpy as np

    return [np.array(shift) for shift in np.ndindex(3, 3, 3)]


# the end of all ranks


def test_one_rank_alone_raises():
    with pytest.raises(ZeroDivisionError):
        ranks.end_all(ZeroDivisionError(), 0, 1)


def test_one_of_several_ends_the_process():
    code = (
        "from lammps_interface.ranks import end_all\n"
        "try:\n    raise ValueError('the reason')\nexcept ValueError as error:\n"
        "    end_all(error, 3, 4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 1
    assert "ERROR on proc 3: the reason" in done.stderr


def test_files_of_the_first_format_are_read():
    unified = HipnnMLIAP(model_bytes(potential(2)), dtype="float64", device="cpu")
    state = unified.__getstate__()
    (state["hipnn"],) = state.pop("models")
    state["format"] = 1
    old = HipnnMLIAP.__new__(HipnnMLIAP)
    old.__setstate__(state)
    data, again = ExchangingData(structure()), ExchangingData(structure())
    old.compute_forces(data)
    evaluate(potential(2), again)
    assert data.energy == again.energy
