"""LAMMPS with GPUs, without one: order of waiting and copying, who computes where, who compiles.

What a GPU would do is done by a CPU: streams that copy later, data objects that note who waited,
and runs of the stock wheel in which positions, pairs and exchanges take the way of a GPU.
"""

import fcntl
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lammps_devices import Compiling, OnDevice, Uncompilable
from lammps_helpers import (
    LIMIT,
    dump_object,
    environment,
    lmp,
    lmp_in_turn,
    needs_lammps,
    tables,
    write_crystal,
)
from test_lammps_data import ExchangingData, KokkosHostData, potential, structure
from test_lammps_model import make_potential

from lammps_interface import couplings, faults, ranks, warm_up
from lammps_interface.couplings import Coupling
from lammps_interface.exchange import LammpsHalo, check_exchange
from lammps_interface.lammps_data import EngineGeometry
from lammps_interface.mliap import HipnnMLIAP
from md_plugin import devices
from md_plugin.checkpoint import model_bytes
from md_plugin.devices import Staging
from md_plugin.neighbours import neighbour_pairs

CPU = torch.device("cpu")


# --- exchanges of a GPU model with LAMMPS on the host -------------------------------------------


class Stream:
    """A stream of a GPU: what is copied without blocking is copied when the host waits."""

    def __init__(self, patch):
        self.queue, self.n_waits, copy = [], 0, torch.Tensor.copy_

        def copy_later(target, source, non_blocking=False):
            if non_blocking:
                self.queue.append(lambda: copy(target, source))
                return target
            return copy(target, source)

        patch.setattr(torch.Tensor, "copy_", copy_later)
        patch.setattr(devices, "wait", lambda device: self.wait())

    def wait(self):
        self.n_waits += 1
        while self.queue:
            self.queue.pop(0)()


def halos(staging):
    data = ExchangingData(structure())
    return LammpsHalo(data, data.n, CPU), LammpsHalo(data, data.n, CPU, staging=staging)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_staged_exchange_is_the_same(dtype):
    """Also where atoms are renumbered; ghosts go up, local rows down, and the other way round."""
    data, staging = ExchangingData(structure()), Staging(CPU)
    n_ghost = data.ntotal - data.n
    for order in (None, torch.randperm(data.ntotal)):
        direct = LammpsHalo(data, data.n, CPU, order)
        staged = LammpsHalo(data, data.n, CPU, order, staging)
        z, y = torch.randn(data.n, 4, dtype=dtype), torch.randn(data.ntotal, 4, dtype=dtype)
        torch.testing.assert_close(staged.fill(z), direct.fill(z), rtol=0, atol=0)
        before = staging.n_bytes
        torch.testing.assert_close(staged.adjoint(y), direct.adjoint(y))
        if order is None:
            assert before == n_ghost * 4 * dtype.itemsize
            assert staging.n_bytes - before == data.n * 4 * dtype.itemsize
    assert len(staging._memory) == data.ntotal * 4 * dtype.itemsize


@pytest.mark.parametrize("way", ["fill", "adjoint"])
def test_the_host_waits_once_before_lammps_reads(way, monkeypatch):
    direct, staged = halos(Staging(CPU))
    rows = torch.randn(direct.n_recv if way == "fill" else direct.n_send, 4)
    expected = getattr(direct, way)(rows)
    # tensors of a GPU are not on the host: an adjoint adds there, in the order of the stream
    monkeypatch.setattr(torch.Tensor, "add_", lambda a, b: [stream.wait(), a.copy_(a + b)][1])
    stream = Stream(monkeypatch)
    found = getattr(staged, way)(rows)
    n_waits = stream.n_waits - (way == "adjoint")
    stream.wait()
    torch.testing.assert_close(found, expected)
    assert n_waits == 1


@pytest.mark.parametrize("way", ["fill", "adjoint"])
def test_without_the_wait_lammps_reads_something_else(way, monkeypatch):
    direct, staged = halos(Staging(CPU))
    rows = torch.randn(direct.n_recv if way == "fill" else direct.n_send, 4)
    expected = getattr(direct, way)(rows)
    staged.staging.room((direct.n_send, 4), rows.dtype).fill_(0.0)
    monkeypatch.setattr(torch.Tensor, "add_", lambda a, b: [stream.wait(), a.copy_(a + b)][1])
    stream = Stream(monkeypatch)
    monkeypatch.setattr(devices, "wait", lambda device: None)
    found = getattr(staged, way)(rows)
    stream.wait()
    assert not torch.allclose(found, expected)


def step_of(x, list_count=1, whole_list=True):
    """What mliap/py hands over, as far as positions and pairs go."""
    n = len(x)
    whole = neighbour_pairs(x, np.zeros((3, 3)), False, 4.0)[0]
    return SimpleNamespace(
        x=x,
        elems=np.zeros(n, np.int32),
        iatoms=np.arange(n, dtype=np.int32),
        has_null=False,
        list_count=list_count,
        whole_list=whole_list,
        skin=1.0,
        row_ptr=whole.row_ptr.numpy(),
        sender=whole.sender.numpy(),
    )


def test_pairs_are_found_once_for_each_list():
    geometry = EngineGeometry((73,), 1.0, 3.0, CPU, finds_pairs=True)
    x = np.random.default_rng(1).uniform(0, 8, (30, 3))
    species, first = geometry.read(step_of(x))
    again, second = geometry.read(step_of(x + 0.01))
    assert second.pairs is first.pairs and again is species and species.tolist() == [73] * 30
    np.testing.assert_array_equal(second.x, x + 0.01)
    _, third = geometry.read(step_of(x, list_count=2))
    assert third.pairs is not first.pairs
    listed = geometry.read(step_of(x, list_count=3, whole_list=False))[1].pairs
    assert torch.equal(listed.row_ptr, first.pairs.row_ptr)  # cutoff and skin


def test_positions_that_are_not_numbers_make_no_list():
    geometry = EngineGeometry((73,), 1.0, 3.0, CPU, finds_pairs=True)
    bad = step_of(np.ones((2, 3)))
    bad.x[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 atoms have positions that are not numbers"):
        geometry.read(bad)


# --- KOKKOS -------------------------------------------------------------------------------------


ARRAYS = ("iatoms", "elems", "pair_i", "pair_j", "rij")


class Recorded(KokkosHostData):
    """Notes in `events` when LAMMPS's arrays are read and when LAMMPS is called."""

    __module__ = KokkosHostData.__module__

    def __init__(self, structure, events):
        self.events = []
        super().__init__(structure)
        self.events = events

    def __getattribute__(self, name):
        if name in ARRAYS:
            self.events.append("read")
        elif name == "eatoms":
            self.events.append("torch")
        return super().__getattribute__(name)

    def forward_exchange(self, *arguments):
        self.events.append("lammps")
        ExchangingData.forward_exchange(self, *arguments)

    def reverse_exchange(self, *arguments):
        self.events.append("lammps")
        ExchangingData.reverse_exchange(self, *arguments)

    def update_pair_forces(self, fij):
        self.events.append("lammps")
        noted, self.events = self.events, []  # its own reads are LAMMPS's
        super().update_pair_forces(fij)
        self.events = noted


def record(monkeypatch, n_layers, skipped=None):
    """Events of the first step of a model; `skipped` is the number of a wait that is left out."""
    events, waits = [], []

    def fence(device):
        waits.append(device)
        if len(waits) - 1 != skipped:
            events.append("wait")

    monkeypatch.setattr(couplings, "fence", fence)
    for name in ("all_rows", "sender_rows"):
        original = getattr(LammpsHalo, name)

        def noted(self, *args, original=original):
            events.append("torch")
            return original(self, *args)

        monkeypatch.setattr(LammpsHalo, name, noted)
    data = Recorded(structure(), events)
    unified = HipnnMLIAP(model_bytes(potential(n_layers)), dtype="float64", device="cpu")
    lammps = SimpleNamespace(version=20260901)
    unified._coupling = Coupling(faults.KOKKOS, n_layers - 1, 4.4, lammps)
    if n_layers > 1:  # as `_prepare` does
        check_exchange(data, CPU, 5)
    unified.compute_forces(data)
    return events, len(waits), data


def assert_in_order(events):
    """Both sides have finished: before arrays are read, around each call of LAMMPS, at the end."""
    for k, event in enumerate(events):
        if event == "lammps":
            assert events[k - 1] == "wait", f"LAMMPS reads what torch still writes: {k}"
            assert events[k + 1 : k + 2] == ["wait"], f"torch goes on while LAMMPS still works: {k}"
        if event == "read":
            assert k and events[k - 1] in ("wait", "read"), f"read before LAMMPS has written: {k}"
    assert events[-1] == "wait", "LAMMPS goes on while torch still works"


@pytest.mark.parametrize("n_layers", [1, 3])
def test_kokkos_and_torch_wait_for_each_other(n_layers, monkeypatch):
    events, _, data = record(monkeypatch, n_layers)
    assert_in_order(events)
    # one exchange forward and one back for each layer but the first, and one of the check
    assert events.count("lammps") == 1 + (2 * (n_layers - 1) + 3 if n_layers > 1 else 0)
    expected = potential(n_layers).evaluate(structure())
    np.testing.assert_allclose(data.folded_forces(), expected.forces.numpy(), atol=1e-12)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_each_wait_is_needed(n_layers):
    with pytest.MonkeyPatch.context() as patch:
        _, n_waits, _ = record(patch, n_layers)
    for skipped in range(n_waits):
        with pytest.MonkeyPatch.context() as patch:
            events, _, _ = record(patch, n_layers, skipped)
        with pytest.raises(AssertionError):
            assert_in_order(events)


def test_a_fence_waits_for_the_whole_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    couplings.fence(torch.device("cuda", 1))
    couplings.fence(CPU)
    assert asked == [torch.device("cuda", 1)]


# --- who computes where -------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def places(monkeypatch, ranks_on_node=4):
    """The row of each rank of a node; numbers through the run are not even told."""
    loaded, found = [], []
    monkeypatch.setattr(HipnnMLIAP, "_load", lambda self, device: loaded.append(device))
    for k in range(ranks_on_node):
        unified = HipnnMLIAP(model_bytes(potential(1)))
        with pytest.raises(AssertionError):  # nothing was loaded
            unified.begin_run("metal", k, ranks_on_node)
        found.append(ranks.placed(loaded[-1], "auto", ranks_on_node))
    return found


def test_four_ranks_of_a_node_share_two_gpus(two_gpus, monkeypatch):
    expected = ["cuda:0 (2 ranks)", "cuda:1 (2 ranks)"] * 2
    assert places(monkeypatch) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # the same for all ranks
    assert places(monkeypatch) == expected


def test_a_launcher_that_shows_each_rank_one_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = []
    for k in range(4):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(k))
        found.append(places(monkeypatch)[k])
    assert found == [f"cuda:0 (GPU {k})" for k in range(4)]
    assert ranks.placed(torch.device("cuda", 0), "auto", 1) == "cuda:0"
    assert ranks.placed(CPU, "auto", 4) == "cpu"


# --- runs ---------------------------------------------------------------------------------------


FRAME = """
units metal
newton on
read_data ../atoms.data
mass * 100
pair_style {pair}
pair_coeff * * {elements}
neighbor 0.5 bin
neigh_modify every 1 delay 0 check yes
velocity all create 900 5 loop geom
timestep 0.002
fix nve all nve
thermo_style custom step atoms pe pxx pyy pxy vol
thermo_modify norm no lost warn format float %.17g
thermo 2
{body}
write_dump all custom dump.end id type x y z fx fy fz modify sort id format float %.17g
"""
SUMS = "compute sa all stress/atom NULL\ncompute ss all reduce sum c_sa[*]\n"
CENTROID = SUMS.replace("stress/atom NULL", "centroid/stress/atom NULL virial")
BODIES = {
    "dynamics": "run 24",
    "exclusions": "group g id 1:9\nneigh_modify exclude group g g\nrun 6\n"
    "neigh_modify exclude none\nrun 4",
    "virials_of_atoms": f"run 3\n{SUMS}thermo_style custom step pe c_ss[*]\nrun 3\n"
    "thermo_style custom step pe pxx\nrun 3",
    "centroid_virials": f"run 3\n{CENTROID}thermo_style custom step pe c_ss[*]\nrun 3\n"
    "thermo_style custom step pe pxx\nrun 3",
    "types_and_atoms_change": "run 2\nset group all type/fraction 2 0.3 7\nrun 2\n"
    "group h id 3:7\ndelete_atoms group h\nrun 2\nchange_box all x scale 0.98 remap\nrun 2",
    "hybrid": "run 4",
}


def write(folder, name, body):
    (folder / name).mkdir()
    pair, elements = f"mliap unified ../{name.split('.')[0]}.pkl 0", "Ta W"
    if "hybrid" in name:
        pair, elements = f"hybrid/overlay {pair} zero 3.0", "mliap Ta W\npair_coeff * * zero"
    text = FRAME.format(pair=pair, elements=elements, body=body)
    (folder / name / "in.lmp").write_text(text)


@pytest.fixture(scope="module", params=[1, 2])
def twins(request, tmp_path_factory):
    """Ranks, folder and outputs of all bodies, as on a CPU and as on a GPU, in one process."""
    folder, n_ranks = tmp_path_factory.mktemp("gpus"), request.param
    write_crystal(folder / "atoms.data", (3, 3, 3), 4.1, tilt=(2.0, -1.0, 1.5))
    model = model_bytes(make_potential(n_interactions=2).model)
    for kind in (HipnnMLIAP, OnDevice):
        dump_object(folder, kind(model, dtype="float64", device="cpu"), f"{kind.__name__}.pkl")
    names = [f"{kind}.{body}" for body in BODIES for kind in ("HipnnMLIAP", "OnDevice")]
    for name in names:
        write(folder, name, BODIES[name.split(".")[1]])
    process, outputs = lmp_in_turn(folder, names, n_ranks)
    assert process.returncode == 0, process.stdout[-3000:]
    return n_ranks, folder, outputs


@needs_lammps
@pytest.mark.parametrize("body", BODIES)
def test_the_way_of_a_gpu_gives_the_same(twins, body):
    _, folder, outputs = twins
    expected, found = (tables(outputs[f"{kind}.{body}"]) for kind in ("HipnnMLIAP", "OnDevice"))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        # float64, another order of sums; steps amplify rounding
        np.testing.assert_allclose(a[:, 1:], b[:, 1:], rtol=1e-9, atol=1e-6)
    dumps = [
        np.loadtxt(folder / f"{kind}.{body}/dump.end", skiprows=9)
        for kind in ("HipnnMLIAP", "OnDevice")
    ]
    scale = np.abs(dumps[1][:, 5:]).max()
    np.testing.assert_allclose(dumps[0][:, 5:], dumps[1][:, 5:], rtol=0, atol=1e-9 * scale)


@needs_lammps
def test_positions_cross_and_pairs_do_not(twins):
    n_ranks, folder, _ = twins
    width = 8 * make_potential(n_interactions=2).n_feat
    for rank in range(n_ranks):
        rows = np.loadtxt(folder / f"OnDevice.dynamics/crossed.{rank}", dtype=int)
        local, atoms, positions, exchanged, builds, listed = rows.T
        assert (positions == 24 * atoms).all()
        # ghosts up in the one exchange forward, local rows up in the one back
        assert (exchanged == width * atoms).all()
        assert 1 < builds[-1] < len(rows) and not listed.any()
        assert (local < atoms).all()
        excluded = np.loadtxt(folder / f"OnDevice.exclusions/crossed.{rank}", dtype=int)
        assert (excluded[:7, 5] > 0).all()  # LAMMPS lists them, and they go over once
        virials = np.loadtxt(folder / f"OnDevice.virials_of_atoms/crossed.{rank}", dtype=int)
        assert not virials[:, 5].any()  # added up on the way, too
        centroid = np.loadtxt(folder / f"OnDevice.centroid_virials/crossed.{rank}", dtype=int)
        assert not centroid[:4, 5].any() and centroid[4, 5] > 0  # listed when asked for


@needs_lammps
def test_one_rank_of_a_node_compiles(tmp_path):
    """An empty cache: the first rank compiles before the first step, one of both what is later."""
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 4.3)
    model = model_bytes(make_potential(n_interactions=2).model)
    dump_object(tmp_path, Compiling(model, dtype="float64", device="cpu"), "Compiling.pkl")
    virials = f"{CENTROID}thermo_style custom step c_ss[*]"
    write(tmp_path, "Compiling.dynamics", f"run 1\n{virials}\nrun 1")
    folder = tmp_path / "Compiling.dynamics"
    env = environment(NUMBA_CACHE_DIR=tmp_path / "cache")
    done = lmp(folder, 2, env=env, limit=3 * LIMIT)
    assert done.returncode == 0, done.stdout
    first, second = (np.loadtxt(folder / f"compiled.{k}", dtype=int) for k in range(2))
    before = first[0, 0]
    assert before > 0 and (first[:, 0] == before).all() and not second[:, 0].any()
    later = np.array([first[:, 1] - before, second[:, 1]])
    assert not later[:, :2].any()
    # each piece once, by the rank that came first
    assert sorted((later[:, 2] > 0).tolist()) == [False, True]
    assert (later[:, 3] == later[:, 2]).all()


@needs_lammps
def test_a_rank_that_cannot_compile_ends_all(tmp_path):
    write_crystal(tmp_path / "atoms.data", (2, 2, 2), 4.3)
    model = model_bytes(make_potential(n_interactions=2).model)
    dump_object(tmp_path, Uncompilable(model, device="cpu"), "Uncompilable.pkl")
    write(tmp_path, "Uncompilable.dynamics", "run 1")
    done = lmp(tmp_path / "Uncompilable.dynamics", 2)
    assert done.returncode != 0
    assert "OSError: no space left for compiled code" in done.stdout
    assert "another rank compiles" not in done.stdout


# --- compiled code on the disk ------------------------------------------------------------------


WRITER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from lammps_interface.warm_up import compiled_code
with compiled_code(alone=True):
    print("in", flush=True)
    sys.stdin.readline()
"""


def test_one_writes_while_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up.tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as writer:
        assert writer.stdout.readline() == "in\n"
        (lock,) = tmp_path.glob("md_plugin-compiled-code-*.lock")
        with lock.open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        writer.kill()  # a process that ends lets go
    with warm_up.compiled_code(alone=False), warm_up.compiled_code(alone=False):
        with lock.open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with warm_up.compiled_code(alone=True):
        pass


def test_without_a_place_for_locks_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_up.tempfile, "tempdir", str(tmp_path / "missing"))
    with warm_up.compiled_code(alone=True), warm_up.compiled_code(alone=True):
        pass


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_warm_up_is_no_step(fused, n_layers):
    """It evaluates, warns of nothing, and changes nothing."""
    model, crystal = potential(n_layers), structure()
    model.info["r_closest"] = 2.0
    before = model.evaluate(crystal)
    warm_up.warm_up(model, fused=fused, alone=True)
    assert not model._warned_close
    assert torch.equal(model.evaluate(crystal).forces, before.forces)
