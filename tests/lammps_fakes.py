"""A LAMMPS source tree, compilers' helpers, apt-get and a `lmp` that only pretend, for tests."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

VERSION = 'LAMMPS_VERSION "4 Jul 2026"'
FILES = {
    "cmake/CMakeLists.txt": "project(lammps)\n",
    "src/version.h": f"#define {VERSION}\n",
    "src/pair.h": "class Pair;\n",
    "src/fmt/core.h": "\n",
    "src/ML-IAP/mliap_unified_couple.pyx": "\n",
    "python/lammps/__init__.py": "__version__ = 0\n",
    "examples/mliap/in.mliap.unified.lj.Ar": "run 0\n",
    "unittest/force-styles/tests/in.manybody": "run 0\n",
    "potentials/big.table": "not needed\n",
}

# `lmp -h` and a run of the checking script; MPICH sets PMI_RANK.
LMP = """#!/bin/sh
case "$1" in
-h) printf 'Installed packages:\\n\\n%s\\n\\nend\\n' "$FAKE_PACKAGES"; exit 0;;
esac
[ "${PMI_RANK:-0}" = 0 ] || exit 0
[ -z "$FAKE_CRASH" ] || { echo "ERROR: $FAKE_CRASH"; exit 1; }
for word; do script=$word; done
value=-6.5; grep -q unified "$script" && value=${FAKE_ENERGY:--6.5}
for step in 0 1 2 3 4 5; do echo "  $step  $value  2.25"; done
"""
CMAKE = """#!/bin/sh
[ "$1" = --version ] && { echo cmake version 3.30.1; exit 0; }
if [ -n "$FAKE_CMAKE_ERROR" ]; then
    printf 'CMake Error at CMakeLists.txt:1 (find):\\n  %s\\n' "$FAKE_CMAKE_ERROR"; exit 1
fi
while [ "$1" != -B ]; do shift; done
mkdir -p "$2" && touch "$2/CMakeCache.txt"
"""
NINJA = """#!/bin/sh
[ "$1" = --version ] && { echo 1.11.1; exit 0; }
echo run >> "$FAKE_COUNT"
echo '[1/1] Re-checking'; echo '[500/500] Linking'
[ -z "$FAKE_NINJA_ERROR" ] || { echo "pair.cpp:7:1: error: $FAKE_NINJA_ERROR"; exit 1; }
sleep "${FAKE_SLEEP:-0}"
cp "$FAKE_LMP" "$2/lmp" && touch "$2/liblammps.so.0"
"""
CYTHON = "#!/bin/sh\necho Cython version 3.1.2\n"
APT_GET = """#!/bin/sh
case "$*" in
*update*) [ -z "$FAKE_UNREACHABLE" ] || { echo "E: Failed to fetch index"; exit 100; };;
*--print-uris*) echo "'http://x/l.orig.tar.gz' lammps.orig.tar.gz 7 SHA256:$FAKE_SHA";;
*--download-only*)
    [ -n "$FAKE_GONE" ] || cp "$FAKE_TARBALL" lammps.orig.tar.gz
    echo "E: Failed to fetch the .dsc"; exit 100;;
esac
"""
APT_CACHE = """#!/bin/sh
[ -z "$FAKE_UNREACHABLE" ] || exit 0
printf 'Package: lammps\\nVersion: 20250204+dfsg.1-3\\n\\nPackage: lammps\\nVersion: 20260704-2\\n'
"""


def write_tree(folder, files=FILES):
    """A folder that looks like LAMMPS's source."""
    for name, text in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Path(folder)


def write_tarball(path, prefix="", files=FILES):
    """The same as a tarball, with or without a top folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return Path(path)


def install(folder, monkeypatch):
    """Puts the pretenders first on PATH, and an empty cache in place of the user's."""
    bin_folder = Path(folder) / "fake-bin"
    bin_folder.mkdir()
    programs = {"cmake": CMAKE, "ninja": NINJA, "cython": CYTHON, "cythonize": CYTHON}
    for name, text in (programs | {"apt-get": APT_GET, "apt-cache": APT_CACHE}).items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (bin_folder / "lmp-to-be").write_text(LMP)
    (bin_folder / "lmp-to-be").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(bin_folder), os.environ["PATH"]]))
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(Path(folder) / "cache"))
    monkeypatch.setenv("FAKE_LMP", str(bin_folder / "lmp-to-be"))
    monkeypatch.setenv("FAKE_COUNT", str(Path(folder) / "count"))
    monkeypatch.setenv("FAKE_PACKAGES", "MANYBODY MC ML-IAP ML-SNAP PLUGIN PYTHON")
    tarball = write_tarball(Path(folder) / "debian.tar.gz")
    monkeypatch.setenv("FAKE_TARBALL", str(tarball))
    monkeypatch.setenv("FAKE_SHA", hashlib.sha256(tarball.read_bytes()).hexdigest())
    return bin_folder


def compilations(folder):
    """How often ninja was run."""
    path = Path(folder) / "count"
    return path.read_text().count("run") if path.exists() else 0


def builder(source):
    """Command of a process that builds."""
    code = (
        "from lammps_interface.lammps_build import BuildOptions, build_lammps\n"
        f"print(build_lammps(BuildOptions({str(source)!r}, harness=False)).root)"
    )
    return [sys.executable, "-c", code]
