"""The cost model of scaling against counts: of images, of LAMMPS, of bytes. No time is asserted."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from lammps_helpers import needs_lammps
from test_bench import QUICK, rows_of

from lammps_interface.traffic import Traffic, read_traffic
from md_plugin import scaling
from md_plugin.bench import predictions, ranks
from md_plugin.bench import scaling as page
from md_plugin.bench.core import Options
from md_plugin.cli import main
from md_plugin.scaling import Machine, Workload

WORK = Workload("2 layers", 2, 64, 6.27, 1.0, 4 / 4.05**3)
MACHINE = Machine(floor=1e-3, atom=1e-5, latency=2e-5, bandwidth=1e9, ghost=1e-7)


def gas(n_atoms, side, seed=3):
    """Atoms anywhere in a periodic cube, so that nothing but their density is there to find."""
    return np.random.default_rng(seed).uniform(0.0, side, (n_atoms, 3)), np.full(3, side)


def images_around(x, box, sides, halo):
    """How many images of the atoms of a periodic box lie within `halo` of its first sub-box."""
    reach, found = [math.ceil(halo / side) + 1 for side in box], 0
    for shift in itertools.product(*(range(-k, k + 1) for k in reach)):
        image = x + np.array(shift) * box
        found += int(((image >= -halo) & (image < sides + halo)).all(axis=1).sum())
    return found - int((x < sides).all(axis=1).sum())


@pytest.mark.parametrize("cut", [(1, 1, 1), (1, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("layers", [1, 2])
def test_ghosts_are_the_images_around_a_box(cut, layers):
    x, box = gas(40_000, 28.0)
    sides, halo = box / cut, layers * WORK.rcut + WORK.skin
    found = scaling.ghosts(sides, 40_000 / 28.0**3, halo)
    # 10,000 atoms in the smallest part: fluctuations are one percent.
    assert found == pytest.approx(images_around(x, box, sides, halo), rel=0.03)


def test_without_an_exchange_layers_are_computed_on_ghosts():
    x, box = gas(40_000, 28.0)
    work = Workload("2 layers", 2, 64, 6.27, 1.0, 40_000 / 28.0**3)
    needed, factor = scaling.recompute(box, work)
    assert needed == scaling.ghosts(box, work.density, 2 * 6.27 + 1.0)
    again = images_around(x, box, box, work.rcut)
    assert factor == pytest.approx((2 * 40_000 + again) / 80_000, rel=0.03)
    alone = Workload("1 layer", 1, 64, 6.27, 1.0, WORK.density)
    assert scaling.recompute(box, alone) == (scaling.ghosts(box, WORK.density, 7.27), 1.0)


@needs_lammps
def test_ghosts_and_bytes_are_those_that_lammps_counts():
    rows = [row for row in rows_of("ranks", Options(atoms=864, rounds=1, quick=True, seed=5))]
    assert [row.provider for row in rows] == ["ours, 1 rank", "ours, 2 ranks"] * 2
    for row in rows:
        assert row.status == "ok" and row.error < 2e-5, row
        notes = row.notes
        ranks, ghosts = notes["ranks"], notes["ghosts"]
        assert len(ghosts) == ranks and sum(notes["local"]) == notes["atoms"]
        assert notes["atoms"] == 864 * (ranks if notes["kind"] == "weak" else 1)
        halo = notes["rcut"] + notes["skin"]
        model = scaling.ghosts(notes["sides"], notes["density"], halo)
        assert np.mean(ghosts) == pytest.approx(model, rel=0.05)
        assert notes["exchanges per step"] == {"forward": 1.0, "reverse": 1.0}
        for count, *ways in zip(ghosts, *notes["bytes per step"].values(), strict=True):
            assert sum(ways) == scaling.traffic(count, notes["width"], 4, notes["layers"])
        # Others than the exchange take some of the step, on every rank.
        assert all(0 < seconds < row.high for seconds in notes["exchange, s"])
        assert notes["seconds in"]["Pair"] > 0 and min(notes["peak of each process, MB"]) > 50
    assert rows[0].notes["parallel efficiency"] == rows[2].notes["parallel efficiency"] == 1.0


def test_rows_of_the_case():
    runs = list(ranks.runs(sized(256)))
    assert len({(run.kind, run.model, len(run.atoms), run.ranks) for run in runs}) == len(runs)
    assert len(runs) == 3 * (3 * 3 + 3) and {run.ranks for run in runs} == {1, 2, 4}
    weak = [run for run in runs if run.kind == "weak" and run.model == "2 layers"]
    assert {len(run.atoms) // run.ranks for run in weak} == {32, 256, 2048}
    assert {len(run.atoms) for run in runs if run.kind == "strong"} == {2048}


def sized(atoms):
    return Options(atoms=atoms, rounds=1, seed=1)


def test_without_lammps_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(ranks, "lammps_absence", lambda: "not installed: LAMMPS")
    assert {row.status for row in rows_of("ranks", QUICK)} == {"not installed: LAMMPS"}


def test_traffic_counts_rows_of_ghosts():
    done = []
    data = SimpleNamespace(
        ntotal=7,
        nlocal=4,
        forward_exchange=lambda *given: done.append(given),
        reverse_exchange=lambda *given: done.append(given),
    )
    traffic, rows = Traffic(), np.zeros((7, 5), np.float32)
    traffic.watch(data)
    data.forward_exchange(rows, rows, 5)
    data.forward_exchange(rows, rows, 5)
    data.reverse_exchange(rows, rows.astype(float), 2)
    assert len(done) == 3 and done[0][0] is rows and done[2][2] == 2
    assert (traffic.forward.exchanges, traffic.forward.bytes) == (2, 2 * 3 * 5 * 4)
    assert (traffic.reverse.exchanges, traffic.reverse.bytes) == (1, 3 * 2 * 8)
    assert traffic.exchange_seconds > 0


def test_a_rank_that_left_nothing_is_named(tmp_path):
    (tmp_path / "traffic.0.json").write_text("[]")
    assert read_traffic(tmp_path, 1) == [[]]
    with pytest.raises(ValueError, match=r"traffic.1.json missing: not every rank has run on this"):
        read_traffic(tmp_path, 2)


def test_a_step_is_the_sum_of_its_costs():
    sides = (30.0, 30.0, 5.0)
    step = scaling.step(WORK, MACHINE, sides, 4, crowd=2.0)
    around = scaling.ghosts(sides, WORK.density, 7.27)
    assert step.local == pytest.approx(30 * 30 * 5 * WORK.density)
    assert step.ghosts == around and step.bytes == around * 64 * 4 * 2
    # Twice through the thin direction, one message to and one fro in each turn.
    assert scaling.swaps(sides, 7.27) == 2 + 2 + 4
    assert step.exchange == pytest.approx(2 * 8 * 2e-5 + step.bytes / 1e9)
    assert step.compute == pytest.approx(2 * (1e-3 + 1e-5 * step.local + 1e-7 * around))
    assert step.seconds == step.compute + step.exchange
    assert scaling.step(WORK, MACHINE, sides, 1).exchange == 0.0


def test_links_beyond_a_node():
    many = Machine(0.0, 0.0, 0.0, bandwidth=450e9, network=50e9)
    assert [many.link(ranks) for ranks in (2, 8, 9, 1024)] == [450e9, 450e9, 100e9, 100e9]
    assert MACHINE.link(64) == 1e9


def test_limits_are_named():
    def of(atoms, ranks):
        return scaling.limits(atoms, ranks, WORK, scaling.cube(atoms / ranks, WORK.density))

    assert of(1e9, 64) == [] and of(1e9, 8) == ["pairs of a rank"]
    assert of(3e9, 1024) == ["atom ids (tagint) need LAMMPS with -DLAMMPS_BIGBIG"]
    assert of(6e8, 1) == ["local and ghost atoms of a rank", "pairs of a rank"]


def test_least_squares_finds_costs_and_their_errors():
    rng = np.random.default_rng(0)
    columns = rng.uniform(1, 10, (12, 2))
    true = np.array([3.0, 0.5])
    exact = scaling.least_squares(columns, columns @ true)
    np.testing.assert_allclose(exact.values, true, rtol=1e-12)
    assert max(exact.errors) < 1e-12
    fits = [
        scaling.least_squares(columns, columns @ true * (1 + 0.02 * rng.standard_normal(12)))
        for _ in range(400)
    ]
    spread = np.std([fit.values for fit in fits], axis=0)
    said = np.sqrt(np.mean(np.square([fit.errors for fit in fits]), axis=0))
    np.testing.assert_allclose(said, spread, rtol=0.15)


def test_a_cost_is_never_negative():
    columns = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    fit = scaling.least_squares(columns, [3.0, 2.0, 1.0])
    assert fit.values[1] == fit.errors[1] == 0.0 and fit.values[0] > 0
    assert scaling.least_squares(columns[:2], [1.0, 2.0]).errors == (math.inf,) * 2


@pytest.mark.parametrize("columns", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 4.0)], [(1.0, 0.0)] * 3])
def test_rows_that_tell_nothing_apart_are_refused(columns):
    with pytest.raises(ValueError, match="do not tell 2 parameters apart: measure more sizes"):
        scaling.least_squares(columns, [1.0] * len(columns))


def document(cores=2):
    """What the bench would write where every row took the time that the model says."""
    rows = []
    for run in ranks.runs(sized(256)):
        grid = ranks.GRIDS[run.ranks]
        notes = ranks.described(run, "{} by {} by {} MPI processor grid".format(*grid))
        sides = notes["sides"]
        work = Workload(run.model, notes["layers"], 64, notes["rcut"], 1.0, notes["density"])
        step = scaling.step(work, MACHINE, sides, run.ranks, max(1.0, run.ranks / cores))
        each = [step.bytes / 2] * run.ranks
        notes |= {
            "cores": cores,
            "local": [step.local] * run.ranks,
            "ghosts": [step.ghosts] * run.ranks,
            "bytes per step": {"forward": each, "reverse": each},
            "exchange, s": [step.exchange] * run.ranks,
            "peak of each process, MB": [400] * run.ranks,
            "parallel efficiency": 1.0,
        }
        row = {"case": "ranks", "status": "ok", "what": run.what, "seconds": step.seconds}
        rows.append(row | {"notes": notes})
    certificate = {"date": "2026-11-25T00:00", "cpu": {"model": "a CPU"}, "commit": "0123456789ab"}
    return {"certificate": certificate, "ceilings": {}, "rows": rows}


def test_the_page_fits_what_was_measured_and_predicts_the_rest(tmp_path):
    source = tmp_path / "bench.json"
    source.write_text(json.dumps(document()))
    assert main(["scaling", str(source), "-o", str(tmp_path / "page")]) == 0
    written = json.loads((tmp_path / "page" / "scaling.json").read_text())
    for model in ranks.networks():
        np.testing.assert_allclose(written["fit"][model]["values"], [1e-3, 1e-5, 1e-7], rtol=1e-6)
    np.testing.assert_allclose(written["fit"]["exchange"]["values"], [2e-5, 1e-9], rtol=1e-6)
    lines = (tmp_path / "page" / "scaling.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| weak, ", "| strong, "))]
    assert len(rows) == 36 and all("| 1.00 |" in line for line in rows)
    assert sum("held out" in line for line in rows) == 3 * 3 + 3 * 2
    assert sum("(held out; 2 ranks a core)" in line for line in rows) == 3 * 4
    assert (tmp_path / "page" / "scaling.png").stat().st_size > 10_000
    # The page can be made again from its own json.
    again = page.write(tmp_path / "page" / "scaling.json", tmp_path / "again")
    assert again[1].read_text() == (tmp_path / "page" / "scaling.md").read_text()


def test_a_file_without_rows_is_refused(tmp_path, capsys):
    source = tmp_path / "bench.json"
    source.write_text(json.dumps(document() | {"rows": []}))
    assert main(["scaling", str(source), "-o", str(tmp_path)]) == 2
    assert "no row of the case ranks: md-plugin bench ranks -o" in capsys.readouterr().err


def test_predictions_say_what_does_not_fit():
    rows = predictions.predictions()
    assert len(rows) == len(predictions.NETWORKS) * 3 * 4
    for row in rows:
        assert 0 < row.efficiency < 1 and row.exchange < row.seconds and row.least < row.seconds
        assert len(row.cells()) == len(predictions.COLUMNS)
    found = {(row.network, row.kind, row.gpus, row.atoms): row for row in rows}
    one = found["1 layer, 64 features", "strong", 8, 10**9]
    assert one.problems == ["pairs of a rank"] and one.exchange == 0.0
    vector = found["2 vector layers, 128 features", "strong", 8, 10**9]
    assert vector.problems == ["pairs of a rank", "memory"]
    assert found["2 layers, 64 features", "strong", 1024, 10**9].problems == []
