"""The physics suite on every kind of network; precision, energy drift, a box cut into ranks."""

import threading
from itertools import product

import numpy as np
import pytest
import torch
from model_helpers import STRUCTURES, crystal, make_model, make_potential, molecule, slab, triclinic
from physics_suite import PhysicsSuite, close, isolated_energy, total_energies

from md_plugin.checkpoint import bundled_models, load_model
from md_plugin.halo import IndexHalo
from md_plugin.kernels import list_backends
from md_plugin.model.hipnn import HipnnSum
from md_plugin.neighbours import Structure, neighbour_pairs
from md_plugin.pairs import Pairs
from md_plugin.potential import Potential


def backend(name):
    reason = list_backends()[name]
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))


class TestHipnn(PhysicsSuite):
    """Scalar, vector and quadrupole networks with one and two interaction layers."""

    @pytest.fixture(params=[backend("torch"), backend("numba")])
    def backend(self, request):
        return request.param

    @pytest.fixture(params=list(product((0, 1, 2), (1, 2))), ids=lambda p: f"order{p[0]}x{p[1]}")
    def potential(self, request, backend):
        order, n_interactions = request.param
        return make_potential(order=order, n_interactions=n_interactions, backend=backend)

    @pytest.fixture(params=STRUCTURES)
    def structure(self, request):
        return STRUCTURES[request.param]()


KINDS = {
    "hop": {"order": 3, "n_max": 4, "norm_eps": 1e-2, "n_interactions": 2},
    "hop, not normalised": {"order": 2, "n_max": 3, "norm_eps": None, "n_hidden": 4},
    "widths": {"order": 1, "n_feat": (4, 6), "n_hidden": (3, 5), "activation": "Tanh"},
    "plain": {"residual": False, "activation": "GELU", "n_gaussians": 8, "n_interactions": 1},
}


class TestOtherKinds(PhysicsSuite):
    """HIP-HOP-NN, other activations and widths, bottlenecks."""

    @pytest.fixture(params=KINDS)
    def potential(self, request):
        return make_potential(backend="torch", **KINDS[request.param])

    @pytest.fixture(params=STRUCTURES)
    def structure(self, request):
        return STRUCTURES[request.param]()


class TestSum(PhysicsSuite):
    """Two networks of different kind, depth and cutoff."""

    @pytest.fixture
    def potential(self):
        parts = make_model(order=1), make_model(n_interactions=1, rcut=2.4, r_max=2.2, seed=1)
        return Potential(HipnnSum(parts), device="cpu", dtype="float64")

    @pytest.fixture(params=STRUCTURES)
    def structure(self, request):
        return STRUCTURES[request.param]()

    def test_isolated_atoms(self, potential):
        for z in potential.species:
            result = potential.evaluate(Structure(np.array([z]), np.array([[1.0, 2.0, 3.0]])))
            parts = (isolated_energy(part, z) for part in potential.model.parts)
            close(result.energy, sum(parts), rtol=1e-13)


def tantalum(name):
    """The structures of the suite at distances that tantalum has."""
    s, scale = STRUCTURES[name](), {"molecule": 2.0, "crystal": 1.3, "slab": 1.3, "triclinic": 1.5}
    x, cell = s.positions * scale[name], s.cell * scale[name]
    return Structure(np.full(len(x), 73), x, cell, s.pbc)


@pytest.mark.skipif("ta" not in bundled_models(), reason="no bundled model 'ta'")
class TestBundled(PhysicsSuite):
    """The model that comes with the package. Energies of tens of eV and stiff short bonds."""

    rounding = 1e-10

    @pytest.fixture
    def potential(self):
        return load_model("ta", device="cpu", dtype="float64")

    @pytest.fixture(params=STRUCTURES)
    def structure(self, request):
        return tantalum(request.param)


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["mixed", "float32"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_single_precision_is_close(name, order, dtype):
    """float32: 6e-8 per rounding, some hundred roundings, sensitivities of some 10 per Å."""
    exact = make_potential(order=order).evaluate(STRUCTURES[name]())
    result = make_potential(dtype, order=order).evaluate(STRUCTURES[name]())
    scale = float(exact.forces.abs().max())
    # Sums and references are float64: thousands of eV of reference energy cost no precision.
    close(result.energy, exact.energy, atol=5e-5)
    assert result.energy.dtype == result.atom_energy.dtype == torch.float64
    close(result.forces, exact.forces, atol=2e-5 * scale)
    close(result.virial, exact.virial, atol=1e-4 * scale)
    geometry = torch.float64 if dtype == "mixed" else torch.float32
    assert result.forces.dtype == result.virial.dtype == geometry


def test_atom_virials_sum_to_the_virial():
    potential = make_potential(order=1)
    structure = triclinic()
    pairs, image = neighbour_pairs(structure.positions, structure.cell, True, potential.rcut)
    x = torch.from_numpy(structure.positions)
    r_ij = x[pairs.sender_long] - x[pairs.receiver] + image @ torch.from_numpy(structure.cell)
    result = potential.evaluate_pairs(torch.from_numpy(structure.species), pairs, r_ij)
    close(result.atom_virial.sum(dim=0), result.virial[0], atol=1e-12)


# --- energy conservation ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_energy_is_conserved(order):
    """Halving the time step divides the fluctuation by four, and there is no drift beside it."""
    potential, structure = make_potential(order=order, backend="torch"), molecule()
    velocities = np.random.default_rng(0).normal(scale=0.005, size=structure.positions.shape)
    coarse = total_energies(potential, structure, 0.2, 60, velocities)
    fine = total_energies(potential, structure, 0.1, 120, velocities)
    assert 3.5 < np.ptp(coarse) / np.ptp(fine[1::2]) < 4.5
    thirds = np.array_split(fine, 3)
    assert abs(thirds[2].mean() - thirds[0].mean()) < np.ptp(fine)


# --- a box cut into ranks ---------------------------------------------------------------------


class Domains:
    """A periodic box cut into bricks; each brick has its atoms and ghost copies of others.

    Atoms are numbered brick by brick; a ghost is a copy of an atom of another brick, or of a
    periodic image, at its own place. One `Pairs` holds all bricks: all local atoms, then all
    ghosts. `bricks` holds each brick's own view, with indices into that numbering.
    """

    def __init__(self, structure, cuts, rcut):
        fractional = structure.positions @ np.linalg.inv(structure.cell)
        brick = np.ravel_multi_index(
            tuple(np.floor(fractional % 1.0 * cuts).astype(int).T % np.array(cuts)[:, None]), cuts
        )
        self.order = np.argsort(brick, kind="stable")
        brick, x = brick[self.order], structure.positions[self.order]
        pairs, image = neighbour_pairs(x, structure.cell, structure.pbc, rcut)
        ghosts, self.n_local = {}, len(x)
        receiver, sender, image = pairs.receiver.tolist(), pairs.sender.tolist(), image.numpy()
        for p, (i, j) in enumerate(zip(receiver, sender, strict=True)):
            if brick[i] != brick[j] or image[p].any():
                key = (brick[i], j, *image[p].tolist())
                sender[p] = self.n_local + ghosts.setdefault(key, len(ghosts))
        self.owner = torch.tensor([key[1] for key in ghosts], dtype=torch.int64)
        moved = [x[key[1]] + np.array(key[2:]) @ structure.cell for key in ghosts]
        self.x = torch.from_numpy(np.vstack([x, *moved]))
        self.brick = torch.tensor([*brick, *(key[0] for key in ghosts)])
        n_send = self.n_local + len(ghosts)
        self.pairs = Pairs(pairs.row_ptr, torch.tensor(sender, dtype=torch.int32), n_send)
        species = torch.from_numpy(structure.species[self.order])
        self.species = torch.cat([species, species[self.owner]])

    def r_ij(self):
        return self.x[self.pairs.sender_long] - self.x[self.pairs.receiver]

    def forces(self, forces):
        """Rows of ghosts returned to their owners, in the order of the structure."""
        local = forces[: self.n_local].index_add(0, self.owner, forces[self.n_local :])
        back = torch.empty_like(local)
        back[torch.from_numpy(self.order)] = local
        return back


class CountingHalo:
    """Another halo, which counts the calls of `fill` and of its adjoint."""

    def __init__(self, halo):
        self.halo, self.fills, self.returns = halo, 0, 0

    def fill(self, features):
        self.fills += 1
        filled = self.halo.fill(features)
        if filled.requires_grad:
            filled.register_hook(self._count)
        return filled

    def _count(self, grad):
        self.returns += 1


def large_crystal():
    """A skewed box of 32 atoms, less than two cutoffs wide in each direction."""
    cell = np.array([[5.6, 0.0, 0.0], [1.3, 5.4, 0.0], [-0.8, 1.1, 5.5]])
    grid = np.array(list(np.ndindex(3, 3, 4)))[:32] / [3, 3, 4]
    x = (grid + np.random.default_rng(8).uniform(-0.05, 0.05, grid.shape)) @ cell
    species = np.random.default_rng(9).choice([1, 6, 8], len(x))
    return Structure(species, x, cell, np.ones(3, bool))


BOXES = {"crystal": crystal, "triclinic": triclinic, "large": large_crystal, "slab": slab}


@pytest.mark.parametrize("backend", [backend("torch"), backend("numba")])
@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 1, 5)])
@pytest.mark.parametrize(("order", "n_interactions"), [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("box", BOXES)
def test_ranks_equal_the_whole_box(box, order, n_interactions, cuts, backend):
    potential = make_potential(order=order, n_interactions=n_interactions, backend=backend)
    whole = potential.evaluate(BOXES[box]())
    domains = Domains(BOXES[box](), cuts, potential.rcut)
    halo = CountingHalo(IndexHalo(domains.owner))
    result = potential.evaluate_pairs(domains.species, domains.pairs, domains.r_ij(), halo=halo)
    assert halo.fills == halo.returns == potential.model.n_exchanges == n_interactions - 1
    assert result.forces.shape == (domains.pairs.n_send, 3)
    close(result.energy, whole.energy, rtol=1e-13)
    close(domains.forces(result.forces), whole.forces, atol=1e-10)
    close(result.virial, whole.virial, atol=1e-10)


@pytest.mark.parametrize(("order", "n_interactions"), [(0, 1), (1, 2), (2, 3)])
def test_centroid_virials_do_not_depend_on_the_cut(order, n_interactions):
    potential = make_potential(order=order, n_interactions=n_interactions)
    found = []
    for cuts in ((1, 1, 1), (2, 1, 2)):
        domains = Domains(large_crystal(), cuts, potential.rcut)
        result = potential.evaluate_pairs(
            domains.species,
            domains.pairs,
            domains.r_ij(),
            halo=IndexHalo(domains.owner),
            positions=domains.x,
        )
        found.append([domains.forces(result.centroid_virial[:, a]) for a in range(3)])
        close(result.centroid_virial.sum(dim=0), result.virial[0], atol=1e-10)
    for whole, cut in zip(*found, strict=True):
        close(cut, whole, atol=1e-10)


@pytest.mark.parametrize(("order", "n_interactions"), [(0, 1), (0, 2), (1, 3)])
def test_centroid_virials_are_the_flow_of_heat_in_a_molecule(order, n_interactions):
    """d/dt sum_i x_i E_i with the weights x_i held fixed is J plus the work at each atom."""
    potential, structure = make_potential(order=order, n_interactions=n_interactions), molecule()
    x = torch.from_numpy(structure.positions)
    v = torch.from_numpy(np.random.default_rng(5).normal(size=x.shape))
    pairs, _ = neighbour_pairs(structure.positions, structure.cell, structure.pbc, potential.rcut)
    species = torch.from_numpy(structure.species)

    def evaluate(x, **settings):
        r_ij = x[pairs.sender_long] - x[pairs.receiver]
        return potential.evaluate_pairs(species, pairs, r_ij, **settings)

    result = evaluate(x, positions=x)
    flux = torch.einsum("kab,kb->a", result.centroid_virial, v)
    h = 1e-5
    change = (evaluate(x + h * v).atom_energy - evaluate(x - h * v).atom_energy) / (2 * h)
    work = (result.forces * v).sum(dim=1)
    # central differences, h = 1e-5: relative to a flux of up to 30 eV Å in its unit of time
    close(flux, x.T @ (change + work), atol=1e-7 * float(flux.abs().max()))
    assert evaluate(x).centroid_virial is None


def test_ghosts_without_a_halo_are_an_error():
    domains = Domains(crystal(), (2, 1, 1), 3.0)
    arguments = domains.species, domains.pairs, domains.r_ij()
    assert make_potential(n_interactions=1).evaluate_pairs(*arguments).energy.isfinite().all()
    with pytest.raises(ValueError, match=r"ghost atoms.*need a halo"):
        make_potential(n_interactions=2).evaluate_pairs(*arguments)


class Ranks:
    """Threads that exchange rows of a joint array, as MPI ranks do, in lockstep."""

    def __init__(self, domains, n_ranks):
        self.barrier = threading.Barrier(n_ranks, timeout=30)
        self.owner, self.n_local = domains.owner, domains.n_local
        self.shared = None
        self.lock = threading.Lock()

    def exchange(self, rows, values, width, collect):
        """All ranks put `values` into `rows` of one zero array, which `collect` then reads."""
        if self.barrier.wait() == 0:
            self.shared = torch.zeros(self.n_local + len(self.owner), width, dtype=torch.float64)
        self.barrier.wait()
        with self.lock:
            self.shared.index_add_(0, rows, values)
        self.barrier.wait()
        return collect(self.shared)


class RankHalo:
    """The halo of one rank: `rows` are its local atoms, then its ghosts, in the joint array."""

    def __init__(self, ranks, rows, n_local):
        self.ranks, self.rows, self.n_local, self.calls = ranks, rows, n_local, []

    def fill(self, features):
        halo, ranks = self, self.ranks

        class Exchange(torch.autograd.Function):
            @staticmethod
            def forward(ctx, features):
                halo.calls.append("forward")
                local = halo.rows[: halo.n_local]

                def collect(shared):
                    joint = torch.cat([shared[: ranks.n_local], shared[ranks.owner]])
                    return joint[halo.rows]

                return ranks.exchange(local, features, features.shape[1], collect)

            @staticmethod
            def backward(ctx, grad):
                halo.calls.append("backward")

                def collect(shared):
                    summed = shared[: ranks.n_local].clone()
                    summed.index_add_(0, ranks.owner, shared[ranks.n_local :])
                    return summed[halo.rows[: halo.n_local]]

                return ranks.exchange(halo.rows, grad, grad.shape[1], collect)

        return Exchange.apply(features)


def rank_of(domains, k):
    """Brick k alone: its species, pairs, r_ij, and its rows in the joint numbering."""
    rows = torch.nonzero(domains.brick == k)[:, 0]
    local = rows[rows < domains.n_local]
    mine = torch.isin(domains.pairs.receiver, local)
    number = torch.full((domains.pairs.n_send,), -1)
    number[rows] = torch.arange(len(rows))
    receiver, sender = domains.pairs.receiver[mine], domains.pairs.sender_long[mine]
    pairs, _ = Pairs.from_edges(number[receiver], number[sender], len(local), len(rows))
    return domains.species[rows], pairs, domains.r_ij()[mine], rows


@pytest.mark.parametrize(("order", "n_interactions"), [(0, 2), (1, 3)])
@pytest.mark.parametrize("box", ["crystal", "large"])
def test_ranks_that_run_side_by_side(box, order, n_interactions):
    """Each brick calls the model by itself; one of them has no atoms, and calls just as often."""
    cuts = (1, 1, 5) if box == "crystal" else (3, 1, 1)
    if box == "large":
        s = large_crystal()
        keep = (s.positions @ np.linalg.inv(s.cell))[:, 0] % 1.0 < 2 / 3
        structure = Structure(s.species[keep], s.positions[keep], s.cell, s.pbc)
    else:
        structure = crystal()
    potential = make_potential(order=order, n_interactions=n_interactions, backend="torch")
    domains = Domains(structure, cuts, potential.rcut)
    n_ranks = int(np.prod(cuts))
    assert set(domains.brick[: domains.n_local].tolist()) < set(range(n_ranks)), "no empty brick"
    ranks, results, halos = Ranks(domains, n_ranks), [None] * n_ranks, [None] * n_ranks

    def run(k):
        species, pairs, r_ij, rows = rank_of(domains, k)
        halos[k] = RankHalo(ranks, rows, pairs.n_recv)
        results[k] = potential.evaluate_pairs(species, pairs, r_ij, halo=halos[k]), rows

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    exchanges = ["forward"] * (n_interactions - 1) + ["backward"] * (n_interactions - 1)
    assert [halo.calls for halo in halos] == [exchanges] * n_ranks
    forces = torch.zeros(domains.pairs.n_send, 3, dtype=torch.float64)
    for result, rows in results:
        forces[rows] += result.forces
    whole = potential.evaluate(structure)
    close(sum(result.energy for result, _ in results), whole.energy, rtol=1e-13)
    close(domains.forces(forces), whole.forces, atol=1e-10)
    close(sum(result.virial for result, _ in results), whole.virial, atol=1e-10)


# --- what a user can get wrong ----------------------------------------------------------------


def test_potential_errors():
    model = make_potential().model
    wanted = "dtype must be one of float64, float32, mixed, fast, got 'f8'"
    with pytest.raises(ValueError, match=wanted):
        Potential(model, dtype="f8")
    with pytest.raises(ValueError, match=r"the model knows H, C, O, but .* also has Si, Ta; .*"):
        make_potential().check_species(np.array([1, 73, 14]))
    with pytest.raises(ValueError, match=r"also has no element \(0\)"):
        make_potential().evaluate(Structure(np.array([0]), np.zeros((1, 3))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there():
    with pytest.raises(ValueError, match=r"device 'cuda:0' was asked for, but torch sees no CUDA"):
        make_potential().__class__(make_potential().model, device="cuda:0")


def test_unknown_element_is_never_silent_below_the_checks():
    """`evaluate_pairs` checks nothing, for speed: an unknown element comes out as NaN."""
    pairs, _ = neighbour_pairs(np.zeros((1, 3)), np.zeros((3, 3)), False, 3.0)
    result = make_potential().evaluate_pairs(torch.tensor([73]), pairs, torch.zeros(0, 3))
    assert result.energy.isnan().all()


def test_repr_shows_the_choices():
    text = repr(make_potential("mixed", order=2, backend="torch"))
    for part in ("quadrupole", "H, C, O", "2 interaction layers", "rcut=3.0 Å", "'mixed'"):
        assert part in text
    assert "device='cpu'" in text and "backend='torch'" in text


def test_reference_energies_follow_the_device_but_not_the_dtype():
    model = make_potential("float32").model
    assert model._reference_energy.dtype == torch.float64
    assert model.to("meta")._reference_energy.device.type == "meta"


def test_element_symbols():
    from ase.data import chemical_symbols

    from md_plugin.elements import SYMBOLS, symbols

    assert list(SYMBOLS) == chemical_symbols[:119]
    assert symbols([1, 73, 0, 119]) == "H, Ta, no element (0), no element (119)"
