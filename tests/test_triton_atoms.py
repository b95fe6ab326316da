"""Atom layers in Triton against torch's operators: orders, widths, numbers of layers and atoms."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from kernel_cases import absence
from test_triton_compile import compiles, run_python

from md_plugin.kernels import BackendError
from md_plugin.model.atom_layers import AtomLayers
from md_plugin.model.config import HipnnConfig
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import Hipnn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there"
)

# Of the largest value: some roundings of sums of a hundred products.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6}
USUAL = HipnnConfig(species=(1, 6, 8), n_interactions=2, n_feat=9, n_hidden=41)
CASES = {
    "one width": replace(USUAL, n_hidden=None, n_atom_layers=3),
    "widths change": replace(USUAL, n_feat=(9, 41), n_hidden=(41, 9), n_atom_layers=1),
    "vector": replace(USUAL, n_feat=(41, 9), n_hidden=17, order=1, n_atom_layers=2),
    "quadrupole": replace(USUAL, order=2, n_atom_layers=0),
    "as many species as features": replace(USUAL, n_feat=3, n_hidden=9),
    "not residual": replace(USUAL, n_hidden=None, residual=False, order=1, n_atom_layers=1),
    "wide": replace(USUAL, n_feat=(80, 100), n_hidden=(70, 128), n_atom_layers=1, order=2),
}


def network(config, dtype):
    torch.manual_seed(0)
    return Hipnn(config, backend="torch").to(DEVICE, dtype)


def both(config, dtype, number):
    """A block by torch's operators, and in kernels."""
    from md_plugin.model.device_atoms import DeviceAtomLayers

    model = network(config, dtype)
    return AtomLayers(model, number, plain=True), DeviceAtomLayers(model, number)


def inputs(shape, n_atoms, dtype):
    """m, large enough for both sides of softplus; features; dE/dx."""
    n_comp, n_in, n_hidden, n_out = shape
    shapes = (n_atoms, n_comp, n_hidden), (n_atoms, n_in), (n_atoms, n_out)
    m, z, g = (torch.randn(shape, dtype=dtype).to(DEVICE) for shape in shapes)
    return 12 * m, z, g


def results(layers, m, z, g, first, n_out):
    """Features and energies; dE/dm, energies and dE/dz: what nobody writes is NaN."""
    out, energy = m.new_full((len(m), n_out), torch.nan), m.new_ones(len(m), dtype=torch.float64)
    layers.forward(m, z, out, energy)
    along, again = None if first else torch.full_like(z, torch.nan), torch.ones_like(energy)
    gm = layers.backward(m, z, g, along, again)
    return [out, energy, gm, again, *([] if first else [along])]


def compare(config, dtype, number, n_atoms, with_gradient=True):
    plain, kernels = both(config, dtype, number)
    m, z, g = inputs(kernels.shape, n_atoms, dtype)
    kinds, first = torch.arange(n_atoms, dtype=torch.int32).to(DEVICE) % 3, number == 0
    if first:
        z = torch.eye(3, dtype=dtype).to(DEVICE)[kinds.long()]
    rest = g if with_gradient else None, first, g.shape[1]
    expected = results(plain, m, z, *rest)
    found = results(kernels, m, kinds if first else z, *rest)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            error = float((a - b).abs().max()) / float(b.abs().max())
            assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_same_as_operators(case, number, dtype):
    compare(CASES[case], dtype, number, 5)


@pytest.mark.parametrize("n_atoms", [0, 1, 16, 67])
def test_numbers_of_atoms_without_a_gradient(n_atoms, monkeypatch):
    """Also in tiles of 16, several of them, of which the last is not full."""
    from md_plugin.kernels import triton_atom_layers

    monkeypatch.setattr(triton_atom_layers, "few", lambda device: 1000)
    compare(CASES["vector"], torch.float64, 1, n_atoms, with_gradient=False)


def test_energies_are_added_where_they_are_wanted():
    _, layers = both(USUAL, torch.float32, 1)
    m, z, g = inputs(layers.shape, 3, torch.float32)
    along, energy = torch.empty_like(z), torch.full((3,), 1e6, dtype=torch.float64).to(DEVICE)
    expected = layers.backward(m, z, g, along, energy)
    assert torch.equal(layers.backward(m, z, g, along), expected)
    out, alone = torch.empty_like(g), torch.zeros_like(energy)
    layers.forward(m, z, out, alone)
    assert torch.equal(energy, 1e6 + alone)  # float64: nothing is lost beside a large energy


@pytest.mark.parametrize("place", ["m", "z", "gradient", "species"])
def test_nan_shows_and_stays_with_its_atom(place):
    _, layers = both(CASES["vector"], torch.float32, number := int(place != "species"))
    m, z, g = inputs(layers.shape, 4, torch.float32)
    kinds = torch.tensor([0, 1, 2, 0], dtype=torch.int32).to(DEVICE)
    {"m": m, "z": z, "gradient": g}.get(place, m)[2] = torch.nan if number else 0.0
    kinds[2] = -1  # an element that the network does not know
    out, energy, gm, *_ = results(layers, m, z if number else kinds, g, not number, g.shape[1])
    others = torch.tensor([0, 1, 3])
    for array in (out, energy) if place != "gradient" else (gm,):
        assert array[2].isnan().all() and array[others].isfinite().all()


@pytest.mark.parametrize("x", [0.0, 1e-30, -1e-8, -17.0, -40.0, -88.0, 19.99, 20.01, 300.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_softplus(x, dtype):
    """A block that is nothing but softplus: relative accuracy on both sides, as in torch."""
    config = replace(USUAL, n_feat=1, n_hidden=None, n_atom_layers=0, residual=False)
    _, layers = both(config, dtype, 1)
    for array in layers.weights:
        if array is not None:
            array.zero_()
    layers.weights.readout[0] = 1.0
    m = torch.full((1, 1, 1), x, dtype=dtype, device=DEVICE)
    out, energy, gm, *_ = results(layers, m, m[0], None, False, 1)
    exact = m.double().requires_grad_()
    value = torch.nn.functional.softplus(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    eps = torch.finfo(dtype).eps
    assert abs(out.double() - value).item() <= 4 * eps * value.item()
    assert abs(gm.double() - slope).item() <= 4 * eps * slope.item()
    assert energy.item() == 1.0 + out.double().item()


def test_who_takes_the_kernels(caplog):
    from md_plugin.model import device_atoms

    reasons = {
        "": {},
        "invariants take the place of norms": {"n_max": 2, "order": 1},
        "the activation is SiLU": {"activation": "SiLU"},
        "the activation is Softplus(beta=2.0": {"activation": "Softplus(beta=2.0)"},
        "layers have 129 features, and at most 128 fit": {"n_feat": (9, 129), "n_hidden": 4},
    }
    for reason, changes in reasons.items():
        model = network(replace(USUAL, **changes), torch.float32)
        assert device_atoms.why_not(model).startswith(reason)
        assert bool(reason) == bool(device_atoms.why_not(model))
        caplog.clear()
        with caplog.at_level("INFO", "md_plugin"):
            step = FusedHipnn(model, "triton")
        said = [r.message for r in caplog.records]
        assert len(said) == bool(reason) and all(f"launches each: {reason}" in s for s in said)
        kind = AtomLayers if reason else device_atoms.DeviceAtomLayers
        assert all(type(layer.atoms) is kind for layer in step.layers)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m, z, out, e: (m[:, :1], z, out, e),
            r"sums have shape \(4, 1, 17\), not \(4, 4, 17\)",
        ),
        (lambda m, z, out, e: (m, z[:3], out, e), r"features have shape \(3, 41\), not \(4, 41\)"),
        (lambda m, z, out, e: (m, z[:, 0], out, e), "species are torch.float32"),
        (lambda m, z, out, e: (m, z, out.double(), e), "come out are torch.float64, the weights"),
        (lambda m, z, out, e: (m, z.T.contiguous().T, out, e), "features are not contiguous"),
        (
            lambda m, z, out, e: (m, z, out, e.float()),
            r"energies are torch.float32 \(4,\), not float64",
        ),
        (lambda m, z, out, e: (m.to("meta"), z, out, e), "an array is on meta, weights on"),
        (
            lambda m, z, out, e: (torch.empty(1 << 25, 4, 17, device="meta"), z, out, e),
            "33554432 atoms at once: offsets of 32 bits hold fewer; take blocks of them",
        ),
    ],
)
def test_arrays_that_do_not_fit(spoil, message):
    _, layers = both(CASES["vector"], torch.float32, 1)
    m, z, g = inputs(layers.shape, 4, torch.float32)
    energy = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match=message):
        layers.forward(*spoil(m, z, torch.empty_like(g), energy))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_broken_kernel_is_an_error(name, monkeypatch):
    from md_plugin.kernels import triton_atom_layers
    from md_plugin.model import device_atoms

    sound = getattr(triton_atom_layers, name)

    def spoiled(shape, weights, m, *rest, **kwargs):
        sound(shape, weights, m, *rest, **kwargs)
        rest[{"forward": 1, "backward": 2}[name]].mul_(1 + 1e-3)

    monkeypatch.setattr(triton_atom_layers, name, spoiled)
    device_atoms.atoms_check.cache_clear()
    wrong = {"forward": "features", "backward": "dE/dm"}[name]
    with pytest.raises(
        BackendError, match=f"computes wrong {wrong} of atom layers in torch.float32"
    ):
        FusedHipnn(network(USUAL, torch.float32), "triton")


def test_the_check_leaves_the_random_numbers_of_others_alone():
    from md_plugin.model import device_atoms

    before = torch.random.get_rng_state()
    device_atoms.atoms_check.__wrapped__(torch.device(DEVICE), torch.float32, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


# The slowest to compile are left out: docs/gpu_kernels.md has what they take.
COMPILED = """
import json, torch
from triton_assembly import assembly, findings, job, work
from md_plugin.kernels import triton_atom_layers, triton_atoms

LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")

@job
def report(name, real, capability, n_comp, width, few=False, first=False):
    dtype = torch.float32 if real == "fp32" else torch.float64
    shape = triton_atom_layers.Shape(n_comp, width, width, width)
    tile = triton_atom_layers.tiles(shape, dtype, few, capability == 90)
    m = torch.empty(1, n_comp, width, dtype=dtype, device="meta")
    constants = triton_atom_layers.options(shape, m, capability == 90) | tile
    options = {key: constants.pop(key) for key in LAUNCH}
    constants |= {"z": None, "gz": None} if first else {"species": None, "adjust": None}
    kernel = getattr(triton_atoms, name + "_kernel")
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    sizes = {"n_atoms": 4801, "n_layers": 3}
    row = findings(assembly(kernel, real, capability, constants, sizes, options)) | tile
    row |= {"real": real, "capability": capability, "n_comp": n_comp, "width": width}
    row |= {"compiled_in": [x.name for x in kernel.params if x.is_constexpr], "few": few}
    print(json.dumps(row | {"kernel": f"{name} {n_comp} x {width}"}))

report("forward", "fp32", 90, 1, 128)
report("backward", "fp32", 90, 1, 64, first=True)
report("backward", "fp32", 80, 1, 64)
report("backward", "fp32", 90, 4, 128, few=True)
report("backward", "fp32", 80, 9, 64)
report("forward", "fp64", 90, 4, 64)
work()
"""


@compiles
def test_atom_layers_compile_for_a100_and_h100(tmp_path):
    """Matrix instructions, 16 bytes at once, nothing in local memory, no atomics."""
    rows = [json.loads(line) for line in run_python(COMPILED, tmp_path).splitlines()]
    assert len(rows) == 6
    for row in rows:
        # What triton 3.9 leaves there of tiles of 64 atoms, 3.6 of others; ten instructions.
        tight = row["BLOCK_A"] == 64 or not version("triton").startswith("3.9.")
        known = 24 if tight and row["kernel"].startswith("backward") else 0
        assert row["STACK"] <= known and (known or row["spill"] == 0), row
        assert row["matrix"] > 0 and row["wide_load"] > 0 and row["add"] == 0, row
        assert (row["tf32"] > 0) == (row["real"] == "fp32"), row
        # 64 rows are what a warp group multiplies at once.
        groups = row["BLOCK_A"] == 64 and row["capability"] == 90
        assert (row["warp_group"] > 0) == groups, row
        # Nothing of a model but its shapes.
        sizes = ("PRECISION", "N_COMP", "N_IN", "N_HIDDEN", "N_OUT")
        assert {x for x in row["compiled_in"] if "BLOCK" not in x} <= {*sizes}, row
    assert any(row["warp_group"] for row in rows)
