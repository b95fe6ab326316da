"""LAMMPS's source, from a folder, a tarball or Debian: what a build needs of it, in a new folder.

Only the parts in `PARTS` are copied or unpacked, a tenth of the whole. A folder that somebody
works in is never built in, and what an earlier build left in it is not copied.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lammps_interface import apt_source
from lammps_interface.build import BuildError

PARTS = ("cmake", "src", "lib", "python", "third_party", "unittest", "examples/mliap")
TOP = {*PARTS, "bench", "doc", "examples", "fortran", "potentials", "tools", ".github"}
LEFTOVERS = (
    "style_*.h",
    "packages_*.h",
    "lmpinstalledpkgs.h",
    "Obj_*",
    "*.o",
    "*.so",
    "__pycache__",
    ".git",
)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


@dataclass(frozen=True)
class Source:
    """Where LAMMPS's source is to come from.

    Attributes:
        kind: "tree", "tarball" or "debian".
        path: of the folder or the tarball, None for Debian.
        wanted: Debian suite or version, None for the newest.
        key: changes when the source does.
    """

    kind: str
    path: Path | None
    wanted: str | None
    key: str

    def __str__(self) -> str:
        wanted = f" ({self.wanted})" if self.wanted else ""
        return f"Debian's source package lammps{wanted}" if self.path is None else str(self.path)


def identify(path: str | Path | None, wanted: str | None = None) -> Source:
    """What is asked for, without fetching or unpacking anything.

    Args:
        path: folder or tarball; None for Debian's source package.
        wanted: Debian suite or version.

    Raises:
        BuildError: the path is not there or cannot be LAMMPS.
    """
    if path is None:
        return Source("debian", None, wanted, f"debian {wanted or 'newest'}")
    path = Path(path).expanduser().resolve()
    if wanted:
        raise BuildError(f"--version chooses among Debian's source packages, not within {path}")
    if path.is_dir():
        version_of(path)
        return Source("tree", path, None, f"tree {path} {_stamps(path)}")
    if not path.is_file():
        raise BuildError(f"there is no LAMMPS source tree or tarball {path}")
    if not tarfile.is_tarfile(path):
        raise BuildError(f"{path} is neither a LAMMPS source tree nor a tarball")
    with path.open("rb") as file:
        return Source("tarball", path, None, hashlib.file_digest(file, "sha256").hexdigest())


def obtain(source: Source, folder: Path, log: Path) -> str:
    """Puts the parts that a build needs into `folder`.

    Args:
        source: from `identify`.
        folder: new folder.
        log: file that output is added to.

    Returns:
        What the source is, in words.

    Raises:
        BuildError: it cannot be fetched or unpacked, or is not LAMMPS.
    """
    if source.kind == "tree":
        assert source.path is not None
        ignore = shutil.ignore_patterns(*LEFTOVERS)
        for part in PARTS:
            if (source.path / part).is_dir():
                shutil.copytree(source.path / part, folder / part, symlinks=True, ignore=ignore)
        return str(source)
    if source.kind == "tarball":
        assert source.path is not None
        unpack(source.path, folder)
        return str(source)
    tarball, version = apt_source.fetch(source.wanted, folder.parent, log)
    unpack(tarball, folder)
    tarball.unlink()
    return f"Debian's source package lammps {version}"


def unpack(tarball: Path, folder: Path) -> None:
    """Unpacks the parts that a build needs, without the tarball's top folder if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix: str | None = None
    try:
        with tarfile.open(tarball) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            for member in tar:
                name = os.path.normpath(member.name)
                first = name.split("/")[0]
                if prefix is None and (member.isdir() or "/" in name) and name != ".":
                    prefix = "" if first in TOP else first + "/"
                name = name.removeprefix(prefix or "")
                if any(name == part or name.startswith(part + "/") for part in PARTS):
                    member.name = name
                    if member.islnk():
                        target = os.path.normpath(member.linkname)
                        member.linkname = target.removeprefix(prefix or "")
                    tar.extract(member, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuildError(f"{tarball} cannot be unpacked: {error}") from error
    version_of(folder, of=tarball)


def version_of(tree: Path, of: Path | None = None) -> int:
    """Version of a source tree as a number, 20260704 for 4 Jul 2026.

    Raises:
        BuildError: it is not LAMMPS, or one without `pair_style mliap unified`.
    """
    header, cmake = tree / "src" / "version.h", tree / "cmake" / "CMakeLists.txt"
    text = header.read_text(errors="replace") if header.is_file() and cmake.is_file() else ""
    found = re.search(r'LAMMPS_VERSION\s+"(\d+) (\w{3})\w* (\d{4})"', text)
    if not found or found[2] not in MONTHS:
        raise BuildError(
            f"{of or tree} is not the source of LAMMPS: it has no src/version.h and "
            "cmake/CMakeLists.txt of it"
        )
    if not (tree / "src" / "ML-IAP" / "mliap_unified_couple.pyx").is_file():
        raise BuildError(
            f"{of or tree} is LAMMPS of {' '.join(found.groups())}, which has no pair_style mliap "
            "unified: use 15 Sep 2022 or later"
        )
    return int(f"{found[3]}{MONTHS.index(found[2]) + 1:02d}{int(found[1]):02d}")


def date_of(version: int) -> str:
    """LAMMPS's way to write a version, "4 Jul 2026" for 20260704."""
    return f"{version % 100} {MONTHS[version // 100 % 100 - 1]} {version // 10000}"


def numeric_date(version: int) -> str:
    """A version as Python packages write it, "2026.7.4" for 20260704."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _stamps(tree: Path) -> str:
    """Changes when a file of the source is added, removed or changed; contents are not read."""
    digest = hashlib.sha256()
    for part in ("src", "cmake", "lib", "python"):
        for folder, folders, files in os.walk(tree / part):
            folders[:] = sorted(set(folders) - {"__pycache__"})
            for name in sorted(files):
                stat = os.lstat(os.path.join(folder, name))
                digest.update(f"{folder}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
