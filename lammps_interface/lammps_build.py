"""`md-plugin lammps build`: a LAMMPS with ML-IAP and Python, compiled, checked, and cached.

    $MD_PLUGIN_CACHE/lammps/<key>/
        bin/lmp                     starts libexec/lmp with the environment that it needs
        libexec/lmp, lib/liblammps.so.0
        site/lammps, lammps-*.dist-info   LAMMPS's Python package of this version
        include/lammps              headers, for plugins
        examples/mliap, tests       of LAMMPS's source: input and logs, inputs of its test harness
        harness/test_pair_style     LAMMPS's own tester of pair styles, where it could be built
        built.json                  what it is; written last
        build.log

The key is made of the source, the packages, KOKKOS, cmake settings, Python and MPI. A build takes
place in `<key>.partial`, which gets its name when it has passed the checks of `lammps_check`: one
that was interrupted is never taken for a finished one, and is removed by the next. Processes that
build the same wait for the first.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lammps_interface import lammps_check, lammps_compile, lammps_harness, lammps_source
from lammps_interface.build import BuildError, _digest, _one_at_a_time, cache_folder, libpython
from lammps_interface.lammps_tools import environment_key, find_platform, find_tools

logger = logging.getLogger("md_plugin")

FORMAT = 1
INFO = "built.json"


@dataclass(frozen=True)
class BuildOptions:
    """What is asked for.

    Attributes:
        source: LAMMPS source tree or tarball; None for Debian's source package.
        wanted: Debian suite or version.
        kokkos: Kokkos source tree or installation; None takes the one in the source, if any.
        no_kokkos: leave KOKKOS out even where the source has it.
        defines: further cmake settings, "NAME=VALUE".
        jobs: compilers at a time; 0 for one on each core.
        force: build again although there is one.
        keep_source: leave the source and the objects in `source-<key>` of the cache.
        harness: also build LAMMPS's test_pair_style.
    """

    source: str | Path | None = None
    wanted: str | None = None
    kokkos: str | Path | None = None
    no_kokkos: bool = False
    defines: tuple[str, ...] = ()
    jobs: int = 0
    force: bool = False
    keep_source: bool = False
    harness: bool = True


@dataclass(frozen=True, eq=False)
class BuiltLammps:
    """A LAMMPS with ML-IAP and Python that was built and checked.

    Attributes:
        root: its folder in the cache.
        lmp: the program; needs no environment.
        environment: for other programs that load it (the harness, Python): variables that replace
            those of the process.
        version: such as 20260704.
        packages: LAMMPS packages in it.
        source: what it was built from, in words.
        harness: LAMMPS's test_pair_style, or None.
        harness_reason: why there is no harness.
    """

    root: Path
    version: int
    packages: tuple[str, ...] = ()
    source: str = ""
    harness_reason: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def lmp(self) -> Path:
        """The program."""
        return self.root / "bin" / "lmp"

    @property
    def kokkos(self) -> bool:
        """Whether KOKKOS is in it."""
        return "KOKKOS" in self.packages

    @property
    def headers(self) -> Path:
        """C++ headers of this version."""
        return self.root / "include" / "lammps"

    @property
    def examples(self) -> Path:
        """LAMMPS's examples/mliap, with logs."""
        return self.root / "examples" / "mliap"

    @property
    def inputs(self) -> Path:
        """LAMMPS's unittest/force-styles/tests: input decks of the harness."""
        return self.root / "tests"

    @property
    def harness(self) -> Path | None:
        """LAMMPS's test_pair_style."""
        path = self.root / "harness" / "test_pair_style"
        return path if path.is_file() else None

    @property
    def title(self) -> str:
        """One line about it."""
        date = lammps_source.date_of(self.version)
        return f"LAMMPS {date} with {' '.join(self.packages)}"

    @property
    def summary(self) -> str:
        """What it is, and what to put on PATH."""
        harness = str(self.harness or f"none: {self.harness_reason}")
        switches = " -k on -sf kk" if self.kokkos else ""
        return (
            f"{self.title}\nfrom {self.source}\nin {self.root}\ntest_pair_style: {harness}\n\n"
            f"    export PATH={self.root / 'bin'}:{Path(sys.prefix) / 'bin'}:$PATH\n"
            f"    mpirun -np 2 lmp{switches} -in in.script\n\n"
            f"and for `import lammps` in Python:\n\n"
            f"    export PYTHONPATH={self.root / 'site'}"
        )


def find_built(kokkos: bool = False) -> BuiltLammps | None:
    """The newest build in the cache that works with this Python and MPI.

    Args:
        kokkos: it must have KOKKOS; otherwise one without is preferred.
    """
    try:
        key = environment_key()
    except BuildError:
        return None
    found = []
    for path in (cache_folder() / "lammps").glob(f"*/{INFO}"):
        built = _read(path.parent, key)
        if built and (built.kokkos or not kokkos):
            found.append((built.kokkos == kokkos, built.version, path.stat().st_mtime, built))
    return max(found, key=lambda row: row[:3])[-1] if found else None


def build_lammps(options: BuildOptions | None = None) -> BuiltLammps:
    """The build that is asked for, from the cache or new.

    Raises:
        BuildError: one sentence on what is missing and what to do; `MissingError` where this
            machine cannot build at all.
    """
    options = options or BuildOptions()
    source = lammps_source.identify(options.source, options.wanted)
    kokkos = lammps_compile.find_kokkos(options.kokkos)
    environment = environment_key_or_missing()
    no_kokkos = "no KOKKOS" if options.no_kokkos else ""
    wanted = (source.key, str(kokkos), no_kokkos, *sorted(options.defines))
    key = _digest(str(FORMAT), environment, *lammps_compile.PACKAGES, *wanted)
    folder = cache_folder() / "lammps" / key
    if not options.force and (built := _read(folder, environment)):
        return built
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder.with_name(f"{key}.lock")):
            if not options.force and (built := _read(folder, environment)):
                return built
            _build(options, source, kokkos, folder)
    except OSError as error:
        raise BuildError(
            f"cannot build LAMMPS in {folder.parent}: {error.strerror or error} "
            f"({error.filename or ''}); MD_PLUGIN_CACHE says which folder is used"
        ) from error
    finished = _read(folder, environment)
    assert finished is not None
    return finished


def environment_key_or_missing() -> str:
    """As `environment_key`, after what it needs has been found to be there."""
    find_platform()
    return environment_key()


def _build(
    options: BuildOptions,
    source: lammps_source.Source,
    kokkos: lammps_compile.Kokkos | None,
    folder: Path,
) -> None:
    """Source, compiler, checks, in a folder that gets its name at the end."""
    partial, log = (
        folder.with_name(f"{folder.name}.partial"),
        folder.with_name(f"{folder.name}.log"),
    )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    log.write_text(f"{options}\n")
    try:
        platform = find_platform()
        tools = find_tools(log)
        logger.info("LAMMPS: fetching %s", source)
        tree = partial / "source"
        words = lammps_source.obtain(source, tree, log)
        plan = lammps_compile.Plan(tree, partial / "build", log, platform, tools, kokkos)
        plan = plan.with_options(options.no_kokkos, options.defines, options.jobs)
        lammps_compile.configure(plan)
        lammps_compile.compile_lammps(plan)
        root = partial / "install"
        lammps_compile.collect(plan, root)
        built = BuiltLammps(root, plan.version, environment=_environment(root))
        reason = "left out by --no-harness"
        if options.harness:
            reason = lammps_harness.build(plan, built)
        if reason:
            logger.info("LAMMPS: no test_pair_style: %s", reason)
        logger.info("LAMMPS: checking")
        info = {"format": FORMAT, "environment": environment_key(), "version": plan.version}
        packages = lammps_check.read_packages(built, log)
        info |= {"packages": packages, "source": words, "harness_reason": reason}
        (root / INFO).write_text(json.dumps(info, indent=1))
        checked = _read(root, environment_key())
        assert checked is not None
        lammps_check.check(checked, plan.packages, log)
        shutil.copy(log, root / "build.log")
        _swap(root, folder)
    finally:
        if options.keep_source:  # also of a build that failed, to look into
            kept = folder.with_name(f"source-{folder.name}")
            shutil.rmtree(kept, ignore_errors=True)
            partial.rename(kept)
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _read(folder: Path, environment: str) -> BuiltLammps | None:
    """A finished build that fits, else None."""
    try:
        info = json.loads((folder / INFO).read_text())
    except (OSError, ValueError):
        return None
    if info.get("format") != FORMAT or info["environment"] != environment:
        return None
    return BuiltLammps(
        folder,
        info["version"],
        tuple(info["packages"]),
        info["source"],
        info["harness_reason"],
        _environment(folder),
    )


def _environment(root: Path) -> dict[str, str]:
    """What bin/lmp sets, for programs that do not start through it."""
    before = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    bins = [str(root / "bin"), str(Path(sys.prefix) / "bin")]
    changed = {
        "PATH": os.pathsep.join([*bins, before["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root / "site"), before["PYTHONPATH"]])),
    }
    if lammps_compile.needs_libpython_name(libpython()):
        names = [str(root / "libpython"), before["LD_LIBRARY_PATH"]]
        changed["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, names))
    return changed
