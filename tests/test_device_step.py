"""Whole steps in buffers, recorded and replayed: the same as steps that run as they are."""

import inspect
import logging

import numpy as np
import pytest
import torch
from graph_recorder import TapeRecorder, launch_counts
from kernel_cases import absence
from model_helpers import STRUCTURES, make_model
from physics_suite import close
from test_fusion import CountingAdjoint, geometry
from test_physics import BOXES, Domains

from md_plugin.halo import IndexHalo
from md_plugin.model import device_atoms, device_step, graphs
from md_plugin.model.buffers import Buffers
from md_plugin.model.device_step import CaptureError, FusedStep, fused_step
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.graphs import CudaRecorder, Watch
from md_plugin.neighbours import Structure
from md_plugin.pairs import Geometry
from md_plugin.potential import Potential

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or bool(absence("triton")),
    reason=absence("triton") or "there is a GPU: these are emulations of one",
)

RCUT = 3.0  # of `make_model`


def network(fast=False, **changes):
    model = make_model(backend="triton", **changes)
    return FusedHipnn(model.float() if fast else model, "triton", fast)


def chain(n_atoms, seed=0, spacing=1.2):
    """Atoms in a row, a little displaced; no cell."""
    rng = np.random.default_rng(seed)
    x = np.arange(n_atoms)[:, None] * np.array([[spacing, 0.0, 0.0]])
    return Structure(rng.choice([1, 6, 8], n_atoms), x + rng.uniform(-0.1, 0.1, x.shape))


def inputs(structure):
    return torch.from_numpy(structure.species), geometry(structure, RCUT)


def same(found, expected):
    """float64; matrix products of more rows may add in another order."""
    close(found.atom_energy, expected.atom_energy, rtol=1e-14, atol=1e-12)
    close(found.forces, expected.forces, atol=1e-12)
    close(found.virial, expected.virial, atol=1e-11)
    close(found.closest, expected.closest, rtol=1e-15)


# --- nothing waits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index.Tensor counts a mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: x.to("meta"), "_to_copy.default copies between cpu and meta"),
        (lambda x: torch.empty(3, device="meta").copy_(x), "copies between cpu and meta"),
        (lambda x: torch.repeat_interleave(x.long() + 1), "repeat_interleave"),
    ],
)
def test_what_makes_the_host_wait_is_named(call, reason):
    with Watch() as watch:
        call(torch.ones(3))
    assert len(watch.waits) == 1 and reason in watch.waits[0]


def test_what_does_not_make_it_wait():
    x = torch.ones(3, 2)
    with Watch() as watch:
        y = x[torch.tensor([0, 2])] * torch.tensor(2.0)
        y[:1] = 3.0
        y.view(-1).sum(dim=0).double()
    assert watch.waits == [] and 0 < watch.launches < 10


KINDS = {
    "scalar": {},
    "vector": {"order": 1, "activation": "PReLU"},
    "quadrupole": {"order": 2, "n_hidden": 3},
    "invariants": {"order": 2, "n_max": 3},
    "mixed Gaussians": {"n_gaussians": 7, "residual": False, "n_atom_layers": 2},
}
FAST = {"fast": {"fast": True, "order": 1}}


@pytest.mark.parametrize("kind", KINDS | FAST)
def test_no_step_waits(kind, monkeypatch):
    step = network(**(KINDS | FAST)[kind])
    species, place = inputs(STRUCTURES["molecule"]())
    with launch_counts(monkeypatch) as launches, Watch() as watch:
        step.evaluate(species, place)
    layers = [name for name, _ in launches if name in ("forward", "backward")]
    assert watch.waits == [] and len(layers) == 4


def test_the_host_asks_once(monkeypatch):
    """Whether all is finite, and the closest pair; then results go where the positions were."""
    potential = Potential(make_model(backend="triton"), dtype="float64", info={"r_closest": 0.1})
    species, place = inputs(STRUCTURES["molecule"]())
    potential.evaluate_geometry(species, place)
    with launch_counts(monkeypatch), Watch() as watch:
        potential.evaluate_geometry(species, place)
    asked = [name for name in watch.waits if "_local_scalar_dense" in name]
    assert watch.waits == asked and len(asked) <= 2


def test_nothing_is_compiled_anew(monkeypatch):
    """What Triton makes code for: constants, and whether integers are 1 or multiples of 16."""
    from md_plugin.kernels import triton_atom_layers, triton_fused

    seen, step = [], network(order=1)
    for n_atoms in (3, 7, 16, 33):
        with launch_counts(monkeypatch) as launches:
            step.evaluate(*inputs(chain(n_atoms)))
        forms = set()
        for name, arguments in launches:
            if name.endswith("_atoms"):
                shape, _, m, *_ = arguments
                forms.add((name, *triton_atom_layers.options(shape, m).items()))
                continue
            where, radial, z, env, *rest = arguments
            *_, begin = rest if rest else (0,)
            options = triton_fused.options(radial, env, back=name == "backward")
            kinds = [(k == 1, k % 16 == 0) for k in (begin, *env.shape[2:])]
            given = z is None, where.translation is None
            forms.add((name, tuple(options.items()), *kinds, *given))
        seen.append(forms)
    assert len(seen[0]) == 7 and all(forms == seen[0] for forms in seen)


# --- buffers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_room_changes_nothing(kind, name, monkeypatch):
    """Also where poison is in what is beyond the last atom and pair."""
    TapeRecorder(monkeypatch, interpreted=kind == "quadrupole" and name == "molecule")
    step, (species, place) = network(**KINDS[kind]), inputs(STRUCTURES[name]())
    expected = step.evaluate(species, place)
    buffers = Buffers.build(place, None, 6, 1.7)
    buffers.fill(species, place)
    n_atoms, n_pair = len(species), place.pairs.n_pair
    buffers.geometry.x[n_atoms:] = torch.nan
    buffers.geometry.pairs.sender[n_pair:] = 10**6
    assert len(buffers.species) >= 1.7 * n_atoms - 1 and len(buffers.species) % 16 == 0
    found = step.evaluate(buffers.species, buffers.geometry)
    assert len(found.atom_energy) == len(buffers.species)
    same(buffers.cut(found), expected)


def test_interpreted_kernels_are_what_the_other_tests_take_them_for(monkeypatch):
    """Recorded and replayed as they are, in float64: what is replaced below computes the same."""
    step, places = network(order=1), [inputs(chain(n, seed=n)) for n in (3, 3, 4)]
    with monkeypatch.context() as patch:
        TapeRecorder(patch)
        expected = [step.evaluate(*place) for place in places]
    recorder = TapeRecorder(monkeypatch, interpreted=True)
    recorded = FusedStep([step], recorder, forced=True)
    for place, want in zip(places, expected, strict=True):
        same(recorded.evaluate(*place), want)
    assert recorder.captures == 1 and recorder.replays == 2


def test_sums_of_pairs_are_the_same_to_the_last_bit():
    """One network layer, whose sums over pairs are those of each row: room adds rows, no order."""
    from md_plugin.kernels import triton_fused

    step, (species, place) = network(n_interactions=1), inputs(chain(5))
    buffers = Buffers.build(place, None, 6, 1.0)
    buffers.fill(species, place)
    env = []
    for kinds, where in ((species, place), (buffers.species, buffers.geometry)):
        there = step.engine.where(step.index[kinds], where)
        env.append(torch.empty(len(kinds), 1, 6, 3, dtype=torch.float64))
        triton_fused.forward(there, step.layers[0].sums.radial, None, env[-1])
    assert torch.equal(env[1][:5], env[0]) and not env[1][5:].any()


def test_capacities_hold_until_a_number_leaves_them():
    first = inputs(chain(20))[1]
    buffers = Buffers.build(first, None, 6, 1.0)
    assert buffers.geometry.pairs.n_recv == buffers.geometry.pairs.n_send == 32
    assert buffers.geometry.pairs.n_pair >= 1.25 * first.pairs.n_pair - 16
    assert all(buffers.fit(inputs(chain(n))[1], None) for n in (17, 20, 21))
    assert not any(buffers.fit(inputs(chain(n))[1], None) for n in (33, 2))
    assert not buffers.fit(inputs(chain(20, spacing=0.6))[1], None)  # twice the pairs
    assert not buffers.fit(inputs(STRUCTURES["crystal"]())[1], None)  # which has images
    domains = Domains(BOXES["crystal"](), (2, 1, 1), RCUT)
    place = Geometry(domains.x, domains.pairs)
    ghosts = Buffers.build(place, IndexHalo(domains.owner), 6, 1.0)
    assert ghosts.fit(place, IndexHalo(domains.owner)) and not ghosts.fit(place, None)


# --- recording --------------------------------------------------------------------------------


def poison(place):
    """Whoever still reads what was copied meets this."""
    place.x.fill_(torch.nan)
    place.pairs.sender.zero_()
    place.pairs.row_ptr.fill_(place.pairs.n_pair)


@pytest.mark.parametrize("kind", ["scalar", "vector", "quadrupole"])
def test_replays_follow_atoms_pairs_and_their_numbers(kind, monkeypatch):
    recorder, part = TapeRecorder(monkeypatch), network(**KINDS[kind])
    step = FusedStep([part], recorder, forced=True)
    counts = []
    # the same number, others, too many for 16, too few for 48
    for k, n in enumerate((9, 9, 9, 9, 12, 5, 13, 7, 33, 36, 34, 4, 5)):
        species, place = inputs(chain(n, seed=k))
        expected = part.evaluate(species, place)
        found = step.evaluate(species, place)
        poison(place)
        species.fill_(0)
        same(found, expected)
        counts.append((recorder.warm_ups, recorder.captures, recorder.replays))
    assert counts[:4] == [(1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]
    assert (
        counts[7] == (1, 1, 7) and counts[8] == (2, 1, 7) and counts[9:11] == [(2, 2, 8), (2, 2, 9)]
    )
    assert counts[-1] == (3, 3, 10)


def test_fast_steps_are_recorded_too(monkeypatch):
    """Powers of two are found on the device, in each replay: features and gradients change."""
    recorder, part = TapeRecorder(monkeypatch), network(**FAST["fast"])
    step = FusedStep([part], recorder, forced=True)
    for k, n in enumerate((9, 9, 12, 5)):
        species, place = inputs(chain(n, seed=k, spacing=1.2 + 0.3 * k))
        expected = part.evaluate(species, place)
        found = step.evaluate(species, place)
        poison(place)
        # float32: products of other numbers of rows may add in another order
        close(found.forces, expected.forces, atol=1e-4 * expected.forces.abs().max().item())
        close(found.atom_energy, expected.atom_energy, rtol=1e-5, atol=1e-5)
    assert (recorder.captures, recorder.replays) == (1, 3)


def test_recorded_steps_know_virials_of_structures_others_those_of_atoms(monkeypatch):
    part = network()
    recorder, (species, place) = TapeRecorder(monkeypatch), inputs(chain(9))
    step = FusedStep([part], recorder, forced=True)
    for split in ("structures", "", "structures"):
        found, expected = (one.evaluate(species, place, None, split) for one in (step, part))
        assert (found.parts is None) == (expected.parts is None) == (not split)
        if split:
            close(found.parts, expected.parts, atol=1e-12)
            close(found.parts.sum(dim=0), found.virial, atol=1e-12)
    assert step.evaluate(species, place, None, "atoms").parts.shape == (9, 3, 3)
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (1, 1, 2)


def test_a_step_moves_atoms_only(monkeypatch):
    """In a cell that changes; results of earlier steps stay as they were."""
    recorder, part = TapeRecorder(monkeypatch), network(order=1)
    step, (species, place) = FusedStep([part], recorder, forced=True), inputs(STRUCTURES["slab"]())
    kept = []
    for k in range(4):
        x = place.x + 0.01 * k
        x[0, 2] += 0.05 * k
        moved = Geometry(x, place.pairs, place.translation, place.translations * (1 + 0.01 * k))
        kept.append((step.evaluate(species, moved), part.evaluate(species, moved)))
    for found, expected in kept:
        same(found, expected)
    assert recorder.captures == 1 and recorder.replays == 3


@pytest.mark.parametrize("order", [0, 1])
def test_segments_between_exchanges(order, monkeypatch):
    """Each step exchanges as often, whether it warms up, records or replays; ghosts come and go."""
    recorder, part = TapeRecorder(monkeypatch), network(order=order, n_interactions=3)
    step = FusedStep([part], recorder, forced=True)
    for k, cuts in enumerate(((2, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 1))):
        structure = BOXES["crystal"]()
        structure.positions[0] += 0.02 * k
        domains = Domains(structure, cuts, RCUT)
        halo = CountingAdjoint(IndexHalo(domains.owner))
        place = Geometry(domains.x, domains.pairs)
        expected = part.evaluate(domains.species, place, IndexHalo(domains.owner))
        same(step.evaluate(domains.species, place, halo), expected)
        assert halo.fills == halo.returns == 2
    # 3 layers: 2 exchanges to, 2 fro, 5 segments
    assert recorder.captures == 5 and recorder.replays == 4 * 5 and recorder.warm_ups == 5


def test_a_rank_without_atoms_exchanges_as_well(monkeypatch):
    recorder, part = TapeRecorder(monkeypatch), network()
    step, (species, place) = FusedStep([part], recorder, forced=True), inputs(chain(0))
    for k in range(3):
        halo = CountingAdjoint(IndexHalo(torch.zeros(0, dtype=torch.int64)))
        found = step.evaluate(species, place, halo)
        assert found.forces.shape == (0, 3) and halo.fills == halo.returns == 1
        assert recorder.captures == 3 * (k > 0)


def test_a_sum_of_networks_is_one_graph(monkeypatch):
    parts = [network(order=1), network(n_interactions=1, seed=1)]
    recorder = TapeRecorder(monkeypatch)
    step, place = FusedStep(parts, recorder, forced=True), inputs(STRUCTURES["molecule"]())
    expected = [part.evaluate(*place) for part in parts]
    for _ in range(3):
        found = step.evaluate(*place)
        close(found.forces, expected[0].forces + expected[1].forces, atol=1e-12)
    assert recorder.captures == 1 and recorder.replays == 2


def test_weights_that_change_are_recorded_anew(monkeypatch):
    recorder = TapeRecorder(monkeypatch)
    monkeypatch.setattr(
        device_step, "fused_step", lambda parts, device, graphs: FusedStep(parts, recorder, True)
    )
    potential = Potential(make_model(backend="triton"), dtype="float64")
    species, place = inputs(STRUCTURES["molecule"]())
    before = [potential.evaluate_geometry(species, place).forces for _ in range(3)][-1]
    with torch.no_grad():
        potential.model.blocks[0][0].layer.sensitivity.mu.mul_(1.05)
    after = [potential.evaluate_geometry(species, place).forces for _ in range(3)][-1]
    assert (after - before).abs().max() > 1e-3 and recorder.captures == 2
    expected = FusedHipnn(potential.model, "triton").evaluate(species, place)
    close(after, expected.forces, atol=1e-12)


# --- who records, and who does not ------------------------------------------------------------


def test_large_steps_run_as_they_are(monkeypatch):
    recorder, part = TapeRecorder(monkeypatch), network()
    step = FusedStep([part], recorder)
    small, large = inputs(chain(4)), inputs(chain(40))  # room for 16 and 48
    # There are some sixty launches.
    monkeypatch.setattr(device_step, "WORK_PER_LAUNCH", 0.3 * part.work)
    for _ in range(2):
        same(step.evaluate(*large), part.evaluate(*large))
    assert recorder.captures == 0 and recorder.warm_ups == 1
    monkeypatch.setattr(device_step, "WORK_PER_LAUNCH", 1e9)
    for _ in range(3):
        same(step.evaluate(*large), part.evaluate(*large))
        same(step.evaluate(*small), part.evaluate(*small))
    assert recorder.captures == 1 and recorder.replays == 2
    monkeypatch.setattr(device_step, "MOST_LAUNCHES", 10)
    step, warm_ups = FusedStep([part], recorder), recorder.warm_ups
    for _ in range(3):
        step.evaluate(*small)
    assert recorder.captures == 1 and recorder.warm_ups == warm_ups + 1
    monkeypatch.setattr(device_step, "WORK_PER_LAUNCH", 0.1 * part.work)
    FusedStep([part], recorder).evaluate(*small)  # too large whatever it launches
    assert recorder.warm_ups == warm_ups + 1


def waiting(monkeypatch):
    """Atom layers in which the host asks for a number."""
    forward = device_atoms.DeviceAtomLayers.forward

    def slow(self, mixed, *others):
        assert float(mixed.sum()) is not None
        forward(self, mixed, *others)

    monkeypatch.setattr(device_atoms.DeviceAtomLayers, "forward", slow)


def test_a_step_that_waits_is_not_recorded(monkeypatch, caplog):
    waiting(monkeypatch)
    recorder, part, place = TapeRecorder(monkeypatch), network(), inputs(STRUCTURES["molecule"]())
    step = FusedStep([part], recorder)
    with caplog.at_level(logging.WARNING, logger="md_plugin"):
        for _ in range(3):
            same(step.evaluate(*place), part.evaluate(*place))
    assert (
        recorder.captures == 0 and caplog.text.count("steps are not recorded in CUDA graphs") == 1
    )
    assert "the host waits: _local_scalar_dense.default asks the device" in caplog.text
    with pytest.raises(RuntimeError, match=r"graphs='always', but.*_local_scalar.*graphs='auto'"):
        FusedStep([part], recorder, forced=True).evaluate(*place)


class Failing(TapeRecorder):
    def capture(self, call):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails(monkeypatch, caplog):
    part, place = network(), inputs(STRUCTURES["molecule"]())
    step = FusedStep([part], Failing(monkeypatch))
    for _ in range(3):
        same(step.evaluate(*place), part.evaluate(*place))
    assert caplog.text.count("in CUDA graphs: operation not permitted when stream is capt") == 1
    domains = Domains(BOXES["crystal"](), (2, 1, 1), RCUT)
    ghosts = domains.species, Geometry(domains.x, domains.pairs), IndexHalo(domains.owner)
    step = FusedStep([part], Failing(monkeypatch))
    step.evaluate(*ghosts)
    with pytest.raises(CaptureError, match=r"graphs failed: op.*graphs='never' \(MD_PLUGIN_GR"):
        step.evaluate(*ghosts)


def test_ghosts_without_a_halo_and_derivatives_are_errors(monkeypatch):
    step = FusedStep([network()], TapeRecorder(monkeypatch), forced=True)
    domains = Domains(BOXES["crystal"](), (2, 1, 1), RCUT)
    with pytest.raises(ValueError, match=r"ghost atoms.*need a halo"):
        step.evaluate(domains.species, Geometry(domains.x, domains.pairs))
    species, place = inputs(STRUCTURES["molecule"]())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        step.evaluate(species, Geometry(place.x.clone().requires_grad_(), place.pairs))


def test_settings(monkeypatch):
    potential = Potential(make_model(backend="triton"))
    place = inputs(STRUCTURES["molecule"]())
    assert potential.graphs == "auto"
    potential.evaluate_geometry(*place)
    assert potential._fused[1].recorder is None
    potential.graphs = "always"
    with pytest.raises(ValueError, match=r"graphs='always' needs.* computes on cpu; graphs='auto'"):
        potential.evaluate_geometry(*place)
    monkeypatch.setenv("MD_PLUGIN_GRAPHS", "sometimes")
    potential = Potential(make_model(backend="triton"))
    with pytest.raises(ValueError, match="graphs must be one of auto, always, never, got 'someti"):
        potential.evaluate_geometry(*place)
    part = network()
    monitored = fused_step([part], torch.device("cpu"), "never")
    assert monitored.recorder is None and not monitored.forced


# --- what torch is asked for ------------------------------------------------------------------


class FakeCuda:
    """The parts of torch.cuda that are used, with their signatures, and in which order."""

    def __init__(self, monkeypatch):
        self.log, self.pools, real = [], [], torch.cuda
        fake, begin = self, inspect.signature(real.graph.__init__)

        class Stream:
            def __init__(self, device=None):
                self.name = f"side of {device}" if device is not None else "current"

            def wait_stream(self, other):
                fake.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self):
                fake.log.append("replay")

            def pool(self):
                return (0, 7)

        class Block:
            def __init__(self, name):
                self.name = name

            def __enter__(self):
                fake.log.append(f"enter {self.name}")

            def __exit__(self, *error):
                fake.log.append(f"leave {self.name}")

        def graph(*args, **kwargs):
            bound = begin.bind(None, *args, **kwargs).arguments
            assert isinstance(bound["cuda_graph"], Graph)
            fake.pools.append(bound["pool"])
            assert bound["stream"].name == "side of cuda:1"
            assert bound["capture_error_mode"] == "thread_local"
            return Block("graph")

        current = Stream()
        monkeypatch.setattr(real, "Stream", Stream)
        monkeypatch.setattr(real, "CUDAGraph", Graph)
        monkeypatch.setattr(real, "graph", graph)
        monkeypatch.setattr(real, "current_stream", lambda device: current)
        monkeypatch.setattr(real, "stream", lambda stream: Block(stream.name))
        monkeypatch.setattr(real, "device", lambda device: Block(str(device)))


def test_the_order_in_which_torch_is_asked(monkeypatch):
    fake = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda:1"))
    assert recorder.warm_up(lambda: fake.log.append("call") or 3) == 3
    assert fake.log == [
        "side of cuda:1 waits for current",
        "enter side of cuda:1",
        "call",
        "leave side of cuda:1",
        "current waits for side of cuda:1",
    ]
    fake.log.clear()
    play, result = recorder.capture(lambda: fake.log.append("call") or 4)
    assert result == 4
    opened = ["enter cuda:1", "enter current", "enter graph", "call"]
    assert fake.log == [*opened, "leave graph", "leave current", "leave cuda:1"]
    play()
    assert fake.log[-1] == "replay"


def test_graphs_share_the_memory_of_those_that_exist(monkeypatch):
    """Torch refuses the pool of graphs that are gone, where a tensor of it is not."""
    fake = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda:1"))
    first, _ = recorder.capture(lambda: None)
    second, _ = recorder.capture(lambda: None)
    assert fake.pools == [None, (0, 7)]
    del first, second
    recorder.capture(lambda: None)
    assert fake.pools[2] is None


def test_a_potential_on_a_gpu_records(monkeypatch):
    """As far as this can be seen without one: the recorder is CUDA's, and follows the setting."""
    FakeCuda(monkeypatch)
    part, device = network(), torch.device("cuda:1")
    assert isinstance(fused_step([part], device, "auto").recorder, graphs.CudaRecorder)
    assert fused_step([part], device, "always").forced
    assert fused_step([part], device, "never").recorder is None
    on_cpu = FusedHipnn(make_model(backend="numba"), "numba")
    assert fused_step([on_cpu], device, "auto").recorder is None
