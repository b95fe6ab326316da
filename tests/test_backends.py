"""Who computes the sums: the order of choices, errors that list what exists, the self-check."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from md_plugin import kernels
from md_plugin.cli import main
from md_plugin.kernels import (
    Backend,
    BackendError,
    backend_choice,
    get_backend,
    list_backends,
    reference,
    registry,
    resolve,
    use_backend,
)
from md_plugin.kernels.closure import SumKernels
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.pairs import Pairs

CPU = torch.device("cpu")
NO_DEVICE = "no CUDA device was found"
CONFIG = HipnnConfig(species=(73,), n_feat=4, n_nu=3, n_interactions=1, n_atom_layers=0)
SUMS = {name: getattr(reference, name) for name in ("envsum", "sensesum", "featsum")}


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch, tmp_path):
    """No environment variable, no settings file, and caches as in a new process."""
    monkeypatch.delenv("MD_PLUGIN_BACKEND", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    caches = (registry._load, registry._absence, registry._auto, registry._self_check)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def user_settings(tmp_path):
    path = tmp_path / "config" / "md_plugin" / "settings.toml"
    path.parent.mkdir(parents=True)
    return path


def one_pair():
    return Pairs.from_edges(torch.tensor([0]), torch.tensor([0]), 1, 1)[0]


def test_every_backend_is_listed_with_its_reason():
    state = list_backends()
    assert list(state) == ["torch", "numba", "triton", "cupy", "numba_cuda"]
    assert state["torch"] == state["numba"] == ""
    assert state["cupy"] in ("", NO_DEVICE) or state["cupy"].startswith("the package cupy is not")
    simulator = " (NUMBA_ENABLE_CUDASIM=1 runs it slowly on the CPU, for tests)"
    assert state["numba_cuda"] in ("", NO_DEVICE + simulator)


def test_the_three_sums_are_attributes():
    for name in ("torch", "numba"):
        backend = get_backend(name)
        assert repr(backend).startswith(f"Backend('{name}'")
        for op in SUMS:
            assert callable(getattr(backend, op)) and callable(getattr(backend.kernels, op))


def test_the_order_of_choices(monkeypatch, user_settings):
    """Each choice is beaten by the next, in the order of the table in docs/backends.md."""
    assert Hipnn(CONFIG).backend == "auto"
    user_settings.write_text('backend = "torch"')
    assert Hipnn(CONFIG).backend == "torch"
    with open("md_plugin.toml", "w") as file:
        file.write('[bench]\nrepeat = 3\n\n[other]\nbackend = "not this one"\n')
    assert Hipnn(CONFIG).backend == "torch"
    with open("md_plugin.toml", "w") as file:
        file.write('backend = "numba"')
    assert Hipnn(CONFIG).backend == "numba"
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "torch")
    assert Hipnn(CONFIG).backend == "torch"
    model = Hipnn(CONFIG, backend="numba")
    assert model.backend == "numba" and "backend='numba'" in repr(model)
    assert resolve(None, model.backend, CPU).name == "numba"
    with use_backend("torch") as chosen:
        assert chosen is get_backend("torch")
        assert resolve(None, model.backend, CPU).name == "torch"
        assert resolve("numba", model.backend, CPU).name == "numba"
    assert resolve(None, model.backend, CPU).name == "numba"


def test_a_model_keeps_its_choice(monkeypatch):
    """The environment is read when a model is made, and not again."""
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "torch")
    model = Hipnn(CONFIG)
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "numba")
    assert model.backend == "torch" and Hipnn(CONFIG).backend == "numba"
    with use_backend("torch"):
        inside = Hipnn(CONFIG)
    assert inside.backend == "torch"


def test_the_choice_reaches_the_kernels(monkeypatch):
    """Per call, per block and from the environment, seen by who is called."""
    called = []

    def spy(name):
        def envsum(*args):
            called.append(name)
            return reference.envsum(*args)

        return Backend("torch", ("cpu",), SumKernels(**SUMS | {"envsum": envsum}))

    spies = {name: spy(name) for name in list_backends()}
    monkeypatch.setattr(registry, "_load", spies.__getitem__)
    inputs = (torch.ones(1, 2), torch.ones(1, 3), one_pair())
    kernels.envsum(*inputs)
    kernels.envsum(*inputs, backend="torch")
    with use_backend("torch"):
        kernels.envsum(*inputs)
        kernels.envsum(*inputs, backend="numba")
        with use_backend("numba"):
            kernels.envsum(*inputs)
        kernels.envsum(*inputs)
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "torch")
    kernels.envsum(*inputs)
    assert called == ["numba", "torch", "torch", "numba", "numba", "torch", "torch"]


def test_a_block_ends_when_its_code_fails():
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert backend_choice() == "auto"


@pytest.mark.parametrize("explicit", [True, False])
def test_unknown_names(monkeypatch, explicit):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "cupy" else name)
    message = r"unknown backend 'nunba'. Available: torch, numba.* Absent: .*cupy: the package cupy"
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "torch" if explicit else "nunba")
    with pytest.raises(BackendError, match=message):
        Hipnn(CONFIG, backend="nunba" if explicit else None)
    if explicit:
        for choose in (get_backend, use_backend("nunba").__enter__):
            with pytest.raises(BackendError, match=message):
                choose(*(["nunba"] if choose is get_backend else []))


def test_settings_file_with_a_fault(user_settings):
    user_settings.write_text('backend = "nunba"')
    with pytest.raises(BackendError, match="unknown backend 'nunba'"):
        Hipnn(CONFIG)
    user_settings.write_text("backend = numba")
    with pytest.raises(BackendError, match=r"settings file .*settings\.toml is not valid TOML"):
        Hipnn(CONFIG)
    assert Hipnn(CONFIG, backend="torch").backend == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_backend(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    for name in ("cupy", "numba_cuda"):
        message = f"'{name}' is not available: {NO_DEVICE}.* Available: t"
        with pytest.raises(BackendError, match=message):
            get_backend(name)


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    state = list_backends()
    assert state["numba"] == "the package numba is not installed (pip install numba)"
    assert state["triton"].endswith("triton is not installed (pip install 'md-plugin[gpu]')")
    assert state["cupy"].endswith("(pip install cupy-cuda12x, or cupy-cuda13x for CUDA 13)")
    assert state["numba_cuda"] == state["numba"]
    assert get_backend("auto").name == "torch"
    with pytest.raises(BackendError, match="backend 'numba' is not available: the package numba"):
        get_backend("numba")


def test_package_that_does_not_import(monkeypatch):
    def broken(name):
        raise OSError("libsomething.so: cannot open")

    monkeypatch.setattr(registry, "import_module", broken)
    assert list_backends()["numba"] == "importing it failed: OSError: libsomething.so: cannot open"


def test_auto_follows_the_device_and_is_logged_once(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="md_plugin"):
        for _ in range(3):
            assert get_backend("auto").name == "numba"
    assert [r.message for r in caplog.records] == ["backend 'auto' chose 'numba' on cpu"]
    there = {name: Backend(name, ("cpu", "cuda"), SumKernels(**SUMS)) for name in list_backends()}
    order = ("triton", "cupy", "numba_cuda", "torch")
    for n_absent, chosen in enumerate(order):
        gone = order[:n_absent]
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_load", there.__getitem__)
            patch.setattr(registry, "_absence", lambda name, gone=gone: "gone" * (name in gone))
            registry._auto.cache_clear()
            assert get_backend("auto", "cuda").name == chosen
    registry._auto.cache_clear()
    assert get_backend("auto", "cuda").name in order  # numba computes on the CPU only


def test_explicit_backend_on_a_device_that_it_cannot_use():
    inputs = (torch.ones(1, 2, device="meta"), torch.ones(1, 3, device="meta"))
    with pytest.raises(BackendError, match="'numba' computes on cpu, not on meta; choose backend="):
        get_backend("numba").envsum(*inputs, one_pair().to("meta"))


@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("fault", ["off by 1e-4", "nan", "only float32"])
def test_self_check_catches_a_broken_kernel(op, fault):
    """Also where the broken sum is not the one that is asked for, and at every try."""

    def wrong(first, second, pairs):
        right = SUMS[op](first, second, pairs)
        if fault == "only float32":
            return right if right.dtype == torch.float32 else right.float().double()
        return right * (1 + 1e-4 if fault == "off by 1e-4" else torch.nan)

    backend = Backend("broken", ("cpu",), SumKernels(**SUMS | {op: wrong}))
    for _ in range(2):
        with pytest.raises(BackendError, match=f"'broken' computes a wrong {op} in torch.float"):
            backend.envsum(torch.ones(1, 2), torch.ones(1, 3), one_pair())


def test_self_check_runs_once():
    calls = []

    def envsum(*args):
        calls.append(args)
        return reference.envsum(*args)

    backend = Backend("watched", ("cpu",), SumKernels(**SUMS | {"envsum": envsum}))
    for _ in range(3):
        backend.envsum(torch.ones(1, 2), torch.ones(1, 3), one_pair())
    assert len(calls) == 2 + 3  # float32 and float64 once, then the calls themselves


def test_import_reads_no_choice():
    """A choice that cannot be met stops who makes a model, not who imports the package."""
    code = (
        "import sys, md_plugin, md_plugin.kernels, md_plugin.model.hipnn\n"
        "assert not {'triton', 'numba', 'md_plugin.kernels.numba_cpu'} & set(sys.modules)\n"
        "config = md_plugin.HipnnConfig(species=(73,))\n"
        "print('imported')\n"
        "md_plugin.Hipnn(config)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"MD_PLUGIN_BACKEND": "bogus"},
        timeout=120,
    )
    assert done.stdout == "imported\n"
    assert "BackendError: unknown backend 'bogus'" in done.stderr


def test_command_line_prints_the_reasons(capsys):
    main(["backends"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in list_backends())
    assert all(reason in printed for reason in list_backends().values())


def test_a_choice_of_the_call_is_not_spoilt_by_the_environment(monkeypatch):
    from md_plugin.kernels import BackendError, envsum
    from md_plugin.pairs import Pairs

    none = torch.zeros(0, dtype=torch.int64)
    pairs, _ = Pairs.from_edges(none, none, 1, 1)
    sense, features = torch.zeros(0, 2), torch.zeros(1, 3)
    monkeypatch.setenv("MD_PLUGIN_BACKEND", "bogus")
    assert envsum(sense, features, pairs, backend="torch").shape == (1, 2, 3)
    with pytest.raises(BackendError, match="bogus"):
        envsum(sense, features, pairs)
