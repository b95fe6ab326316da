"""How kernels are launched: what is measured, kept, used by later runs, and what is not."""

import json
import logging
import os

import pytest
import torch
from graph_recorder import TapeRecorder
from kernel_cases import absence
from model_helpers import make_model
from test_device_step import chain, inputs, network
from test_triton_compile import compiles, run_python

from md_plugin import cli_tune
from md_plugin.cli import main
from md_plugin.kernels import tuning
from md_plugin.model.fusion import FusedHipnn

CPU = torch.device("cpu")
USUAL = {"BLOCK_P": 16, "BLOCK_NU": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": 1}
TILE = {"rows": 64, "columns": 16, "terms": 16, "num_warps": 4, "num_stages": 2}
TILE |= {"n_share": 3, "wide": 1}
KEY = "forward 1 8 4 float32"
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or bool(absence("triton")),
    reason=absence("triton") or "there is a GPU",
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (tuning._measured, tuning.identity, tuning.shipped_for)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_a_shape_is_known_by_its_class():
    assert tuning.key("forward", (100, 4, 20, 128), torch.float32) == "forward 4 32 128 float32"
    assert tuning.key("backward", (7, 1, 1, 65), torch.float64) == "backward 1 1 128 float64"


def test_neighbours_are_one_step_away_and_within_bounds():
    found = tuning.neighbours(USUAL)
    assert {**USUAL, "num_warps": 2} in found and {**USUAL, "BLOCK_F": 32} in found
    for options in found:
        assert sum(options[k] != USUAL[k] for k in USUAL) == 1
        assert all(tuning.LEAST[k] <= options[k] <= tuning.MOST[k] for k in USUAL)
    assert len(found) == 3 + 2 + 1  # blocks and stages only grow from here


def test_measurements_come_back(tmp_path):
    fast = {**USUAL, "num_warps": 2}
    assert tuning.chosen("forward", (3, 1, 5, 4), torch.float32, CPU) == {}
    path = tuning.save({KEY: fast}, CPU)
    assert path == tmp_path / "md_plugin" / "tuning" / "interpreter.json"
    tuning.save({"backward 1 8 4 float32": USUAL}, CPU)
    assert tuning.chosen("forward", (3, 1, 5, 4), torch.float32, CPU) == fast
    assert tuning.chosen("backward", (3, 1, 5, 4), torch.float32, CPU) == USUAL
    assert tuning.chosen("forward", (3, 1, 5, 5), torch.float32, CPU) == {}
    assert [p.name for p in path.parent.iterdir()] == ["interpreter.json"]
    with tuning.trying({"num_warps": 8}):
        assert tuning.chosen("forward", (3, 1, 5, 4), torch.float32, CPU) == {"num_warps": 8}


def test_a_file_appears_whole_or_not_at_all(monkeypatch):
    path = tuning.save({KEY: USUAL}, CPU)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        tuning.save({KEY: {**USUAL, "num_warps": 8}}, CPU)
    assert path.read_text() == before


def change(name, value):
    def changed(content):
        content["identity"][name] = value
        return content

    return changed


FAULTS = {
    "measured with another gpu": change("gpu", "GT 710"),
    "measured with another torch": change("torch", "1.0"),
    "measured with another triton": change("triton", "2.0"),
    "measured with another kernels": change("kernels", "0000"),
    "does not say what it holds for": lambda content: {"options": content["options"]},
    "it has no options": lambda content: {"identity": content["identity"]},
    "not one number for each": lambda content: content | {"options": {KEY: {"num_warps": 4}}},
    "num_warps is 3": lambda content: content | {"options": {KEY: {**USUAL, "num_warps": 3}}},
    "receivers is 0": lambda content: content | {"options": {"block 1 8": {"receivers": 0}}},
    "rows is 48": lambda content: content | {"options": {"product 1 8": TILE | {"rows": 48}}},
    "BLOCK_F is 4096": lambda content: content | {"options": {KEY: {**USUAL, "BLOCK_F": 4096}}},
    "BLOCK_P is '16'": lambda content: content | {"options": {KEY: {**USUAL, "BLOCK_P": "16"}}},
}


@pytest.mark.parametrize("fault", [*FAULTS, "Expecting"])
def test_files_that_are_of_no_use_are_told_once(fault, caplog):
    path = tuning.save({KEY: USUAL}, CPU)
    text = path.read_text()
    path.write_text(json.dumps(FAULTS[fault](json.loads(text))) if fault in FAULTS else text[:50])
    tuning._measured.cache_clear()
    with caplog.at_level(logging.WARNING, logger="md_plugin"):
        for _ in range(3):
            assert tuning.chosen("forward", (3, 1, 5, 4), torch.float32, CPU) == {}
    assert len(caplog.records) == 1
    assert fault in caplog.text and str(path) in caplog.text and "`md-plugin tune`" in caplog.text


def test_without_a_gpu_the_command_refuses(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    assert "'cuda' was asked for, but torch sees no CUDA device" in capsys.readouterr().err
    assert main(["tune", "--device", "cpu"]) == 2
    assert "kernels are tuned on a GPU, not on cpu" in capsys.readouterr().err


class FakeClock:
    """Seconds by the options that are tried: two stages beat one, and few warps beat many."""

    def __call__(self, call):
        call()
        options = tuning._trial.get()
        return options.get("num_warps", options.get("receivers")) / stages(options) ** 2


def stages(options):
    """Of a layer's kernel; blocks and tiles of products leave them alone."""
    return options["num_stages"] if options and "BLOCK_P" in options else 1


@interpreted
@pytest.mark.parametrize(
    "order, kinds",
    [(0, {"float64"}), (1, {"float64"}), (0, {"float32", "float16"})],
    ids=["scalar", "vector", "fast"],
)
def test_the_fastest_that_is_right_wins(order, kinds, monkeypatch, capsys):
    """What does not compile, or is wrong, is named: two stages forward, half the warps backward."""
    from md_plugin.kernels import triton_fused
    from md_plugin.model import tuner

    fast = "float16" in kinds
    model = make_model(backend="triton", order=order).to(torch.float32 if fast else torch.float64)
    step, n_comp = FusedHipnn(model, "triton", fast), (1, 4)[order]
    TapeRecorder(monkeypatch)
    forward, backward = triton_fused.forward, triton_fused.backward

    def limited(*args):
        if stages(tuning._trial.get()) == 2:
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        forward(*args)

    def wrong(where, radial, z, ge, found, **rest):
        backward(where, radial, z, ge, found, **rest)
        found.forces[1] *= 1 + 1e-3 * (stages(tuning._trial.get()) == 2)

    monkeypatch.setattr(triton_fused, "forward", limited)
    monkeypatch.setattr(triton_fused, "backward", wrong)
    monkeypatch.setattr(tuner, "FusedHipnn", lambda *args: step)
    monkeypatch.setattr(triton_fused, "tiles", lambda *args: USUAL | {"GROUP": 1})
    cli_tune.run_tune([model], CPU, clock=FakeClock(), per_side=2, fast=fast)
    said = capsys.readouterr().out
    assert "num_stages 2: RuntimeError: out of resource: shared memory\n" in said
    assert said.count("discarded for forward") == said.count("discarded for backward") == 2
    assert "num_stages 2: wrong by " in said and "interpreter.json" in said
    table = dict(tuning._measured(CPU, os.environ["XDG_CACHE_HOME"]))
    products = [table.pop(name) for name in [*table] if name.startswith("product")]
    assert len(table) == 4 and len(products) == (4 if fast else 0)  # to and fro, in two layers
    for name, options in table.items():
        assert name.split()[1:3] == [str(n_comp), "8"]
        assert options == {**USUAL, "num_warps": 2}
    assert {name.split()[-1] for name in table} == kinds
    # A later run takes them.
    kind = "float16" if fast else "float64"
    env = torch.empty(1, n_comp, 6, 5, dtype=getattr(torch, kind))
    used = triton_fused.options(step.layers[1].sums.radial, env)
    assert {k: used[k] for k in tuning.NAMES} == table[f"forward {n_comp} 8 8 {kind}"]


@interpreted
def test_what_was_found_is_kept_where_the_rest_is_cut_off(monkeypatch, capsys):
    """Kernel by kernel; one that cannot be launched at all is named, and others are measured."""
    from md_plugin.kernels import triton_fused
    from md_plugin.model import tuner

    model = make_model(backend="triton", n_interactions=1).double()
    step, kept = FusedHipnn(model, "triton"), []
    TapeRecorder(monkeypatch)

    def forward(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(triton_fused, "forward", forward)
    monkeypatch.setattr(tuner, "FusedHipnn", lambda *args: step)
    monkeypatch.setattr(triton_fused, "tiles", lambda *args: USUAL | {"GROUP": 1})
    save = tuning.save
    monkeypatch.setattr(tuning, "save", lambda *args: kept.append(save(*args).read_text()))
    cli_tune.run_tune([model], CPU, clock=FakeClock(), per_side=2)
    said = capsys.readouterr().out
    assert "discarded for forward" in said and "no kernel image is available" in said
    assert len(kept) == 1 and "backward 1 8" in kept[0] and "forward" not in kept[0]


@interpreted
def test_the_fastest_blocks_are_kept(monkeypatch, capsys):
    """Of sizes about the usual one; what is wrong is left out; later networks take them."""
    from md_plugin.kernels import triton_fused
    from md_plugin.model import fused_device, tuner

    model = make_model(backend="triton", order=0).double()
    n_byte = 8 * FusedHipnn(model, "triton").layers[1].sums.weight[:, 0].numel()
    monkeypatch.setattr(fused_device, "BLOCK_BYTES", 192 * n_byte)
    monkeypatch.setattr(tuner, "BLOCK_SIZES", [n * n_byte for n in (8, 64, 112, 128, 1 << 20)])
    TapeRecorder(monkeypatch)
    forward = triton_fused.forward

    def limited(where, radial, z, env, begin=0):
        forward(where, radial, z, env, begin)
        env.mul_(1.1 if len(env) == 64 else 1.0)

    monkeypatch.setattr(triton_fused, "forward", limited)
    assert FusedHipnn(model, "triton").layers[1].block == 192
    cli_tune.run_tune([model], CPU, clock=FakeClock(), per_side=2)
    said = capsys.readouterr().out
    step = FusedHipnn(model, "triton")
    assert step.layers[1].block == 112  # 8 are too few, and a million are more than atoms
    assert "receivers 64: wrong by" in said and "receivers 8:" not in said
    assert f"{step.layers[1].sums.block_key}: 192000000 -> 112000000 us with receivers 112" in said


@interpreted
def test_tiles_of_products_come_back(monkeypatch):
    from md_plugin.kernels import triton_matmul as matmul

    shape = (400, 60, 16)
    usual = matmul.tile_of(shape, 2, CPU)
    assert usual == matmul.chosen(shape, 2)
    tuning.save({matmul.key(shape, 2): TILE}, CPU)
    assert matmul.tile_of((390, 60, 16), 2, CPU) == matmul.Tile(64, 16, 16, 4, 2, 3, True)
    assert matmul.tile_of((200, 60, 16), 2, CPU) == matmul.chosen((200, 60, 16), 2)
    assert matmul.tile_of(shape, 1, CPU) == matmul.chosen(shape, 1)
    found = matmul.candidates(shape, 2, CPU)
    assert found[0] == usual and len(set(found)) == len(found) > 2
    with tuning.trying(TILE):
        assert matmul.tile_of((7, 1, 1), 1, CPU).n_share == 3
        assert tuning.known(KEY, CPU) == {}


@interpreted
def test_options_reach_the_kernels(monkeypatch):
    """Other tiles, the same sums, with what is in the cache."""
    from md_plugin.kernels import triton_fused

    step, (species, place) = network(), inputs(chain(3))
    where = step.engine.where(step.index[species], place)
    radial, found = step.layers[0].sums.radial, []
    seen = spy(monkeypatch, triton_fused.forward_kernel)
    for options in ({}, {**USUAL, "BLOCK_P": 32, "num_warps": 2}):
        if options:
            tuning.save({"forward 1 8 4 float64": options}, CPU)
        found.append(torch.empty(3, 1, 6, 3, dtype=torch.float64))
        triton_fused.forward(where, radial, None, found[-1])
    assert seen[0]["BLOCK_P"] == 16 and (seen[1]["BLOCK_P"], seen[1]["num_warps"]) == (32, 2)
    assert torch.allclose(found[1], found[0], rtol=1e-13)


def spy(monkeypatch, kernel):
    """Constants of the launches of a kernel from now on."""
    seen, run = [], type(kernel).__getitem__

    def watched(self, grid):
        launch = run(self, grid)

        def call(*args, **options):
            seen.append(options)
            return launch(*args, **options)

        return call

    monkeypatch.setattr(type(kernel), "__getitem__", watched)
    return seen


def test_what_ships_is_of_these_kernels_and_well_formed():
    content = json.loads(tuning.SHIPPED.read_text())
    assert set(content) == {"kernels", "options"}
    for capability, table in content["options"].items():
        assert capability in ("sm_80", "sm_90")
        for name, entries in table.items():
            kernel, n_comp, n_nu, n_feat, dtype = name.split()
            shape = (1, int(n_comp), int(n_nu), int(n_feat))
            assert tuning.key(kernel, shape, getattr(torch, dtype)) == name
            assert entries and all(tuning._checked(options) for options in entries)


FIRST = """
import json
from md_plugin.kernels import tuning
from tuning_table import MOST_STACK, compiled

table = json.loads(tuning.SHIPPED.read_text())["options"]
chosen = ((90, "forward 4 32 128"), (90, "backward 4 32 128"), (80, "backward 9 32 64"))
for capability, key in chosen:
    kernel, n_comp, _, n_feat = key.split()
    with tuning.trying(table[f"sm_{capability}"][key + " float32"][0]):
        found = compiled(kernel, capability, (int(n_comp), 20, int(n_feat)))
    print(json.dumps(found | {"most": MOST_STACK}))
"""


@compiles
def test_what_ships_spills_next_to_nothing(tmp_path):
    if json.loads(tuning.SHIPPED.read_text())["kernels"] != tuning.checksum():
        pytest.skip("the table is of other kernels and not used: python tests/tuning_table.py")
    rows = [json.loads(line) for line in run_python(FIRST, tmp_path).splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["STACK"] <= row["most"] == 32 and row["matrix"] > 0, row


def test_tables_of_other_kernels_are_not_used(monkeypatch, tmp_path):
    entry = {"kernels": tuning.checksum(), "options": {"sm_90": {KEY: [USUAL]}}}
    file = tmp_path / "tuning.json"
    monkeypatch.setattr(tuning, "SHIPPED", file)
    file.write_text(json.dumps(entry))
    assert tuning.shipped_for("sm_90") == {KEY: [USUAL]} and tuning.shipped_for("sm_70") == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    gpu = torch.device("cuda:0")
    assert tuning.chosen("forward", (3, 1, 5, 4), torch.float32, gpu) == USUAL
    assert tuning.file_of(gpu).name == "nvidia-h100.json"
    assert tuning.candidates(KEY, {**USUAL, "num_warps": 8}, gpu)[:2] == [
        {**USUAL, "num_warps": 8},
        USUAL,
    ]
    tuning.shipped_for.cache_clear()
    file.write_text(json.dumps(entry | {"kernels": "others"}))
    assert tuning.shipped_for("sm_90") == {}
