"""LAMMPS's source tarball from the Debian source package `lammps`, fetched by apt-get.

The machine's own apt sources say where: the entry of its distribution, as `deb-src`, with another
suite where one is asked for. apt keeps its lists in a folder of ours, so that this needs no
privileges and leaves the system's lists alone. Of the package only the original tarball is used;
its SHA256 comes from the signed index, and is checked whatever apt-get says about the other files.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lammps_interface.build import BuildError

PACKAGE = "lammps"
APT = Path("/etc/apt")
NEWEST = "sid"  # the suite that has new LAMMPS versions first
SUITES = ("sid", "testing", "stable", "experimental")  # where a version is looked for
INSTEAD = "give a source tree or a tarball of LAMMPS instead: md-plugin lammps build PATH"


class MissingError(BuildError):
    """Something that this machine lacks, or cannot reach, without which nothing can be built."""


@dataclass(frozen=True)
class AptEntry:
    """One place that packages come from.

    Attributes:
        uri: address of the archive.
        suites: such as ("bookworm", "bookworm-updates").
        components: such as ("main",).
        signed_by: value of Signed-By, "" where there is none.
    """

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""

    def stanza(self, suites: tuple[str, ...]) -> str:
        """The deb822 text of the same archive's source packages in other suites."""
        signed = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return (
            f"Types: deb-src\nURIs: {self.uri}\nSuites: {' '.join(suites)}\n"
            f"Components: {' '.join(self.components)}\n{signed}"
        )


def apt_entries(folder: Path = APT) -> list[AptEntry]:
    """All entries of sources.list and sources.list.d, in both of apt's formats."""
    entries: list[AptEntry] = []
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        entries += _deb822(text) if path.suffix == ".sources" else _one_line(text)
    return entries


def _one_line(text: str) -> list[AptEntry]:
    entries = []
    for line in text.splitlines():
        found = re.match(r"deb(?:-src)?\s+(?:\[(.*?)\]\s*)?(\S+)\s+(\S+)\s+([^#]*)", line.strip())
        if found:
            options, uri, suite, components = found.groups()
            signed = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
            entry = (uri, (suite,), tuple(components.split()))
            entries.append(AptEntry(*entry, signed_by=signed[1] if signed else ""))
    return entries


def _deb822(text: str) -> list[AptEntry]:
    entries = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():  # goes on, such as a key that is written out
                fields[name] = fields.get(name, "") + "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        suites, components = (tuple(fields.get(n, "").split()) for n in ("suites", "components"))
        signed = fields.get("signed-by", "")
        entries += [AptEntry(u, suites, components, signed) for u in fields.get("uris", "").split()]
    return entries


def distribution() -> tuple[str, str]:
    """Name and codename of the running system, such as ("debian", "bookworm")."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "", ""
    return release.get("ID", ""), release.get("VERSION_CODENAME", "")


def archive(entries: list[AptEntry], codename: str) -> AptEntry:
    """The entry of the distribution itself.

    Raises:
        MissingError: there is none.
    """
    for entry in entries:
        if codename in entry.suites and "main" in entry.components:
            return entry
    raise MissingError(
        f"the apt sources of this machine have no entry for its own suite "
        f"({codename or 'unknown'}, component main), from which the LAMMPS source package could be "
        f"fetched; {INSTEAD}"
    )


def fetch(wanted: str | None, folder: Path, log: Path) -> tuple[Path, str]:
    """Downloads the original tarball of the source package.

    Args:
        wanted: suite ("trixie"), version or its beginning ("20250204"), or None for the newest.
        folder: where to put it, and apt's lists.
        log: file that the output of apt-get is added to.

    Returns:
        The tarball, and the version of the source package.

    Raises:
        MissingError: no apt-get, no archive, or one that cannot be reached, lacks LAMMPS, or sends
            something else than it says.
        BuildError: no such version.
    """
    if not shutil.which("apt-get") or not shutil.which("apt-cache"):
        raise MissingError(f"there is no apt-get here to fetch LAMMPS's source package; {INSTEAD}")
    name, codename = distribution()
    entry = archive(apt_entries(), codename)
    by_version = bool(wanted and wanted[0].isdigit())
    own = (codename,) if name != "debian" else ()
    if by_version:
        suites = own or SUITES
    else:
        suites = (wanted,) if wanted else own or (NEWEST,)
    apt = _Apt(folder, log, entry.stanza(suites))
    version = _choose(apt.versions(suites), wanted if by_version else None, suites)
    file, digest = apt.tarball(version)
    apt.run("apt-get", "source", "--download-only", f"{PACKAGE}={version}")
    path = folder / file
    if not path.is_file():
        raise MissingError(f"apt-get could not fetch {file}, see {log}; {INSTEAD}")
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != digest:
        raise MissingError(f"{file} has SHA256 {found} but the archive says {digest}: try again")
    return path, version


def _choose(versions: list[str], wanted: str | None, suites: tuple[str, ...]) -> str:
    places = " ".join(suites)
    if not versions:
        raise MissingError(f"{places} has no source package {PACKAGE}; {INSTEAD}")
    usable = [version for version in versions if version.startswith(wanted or "")]
    if not usable:
        raise BuildError(
            f"no source package {PACKAGE} of version {wanted} in {places}: there are "
            f"{', '.join(sorted(set(versions)))}"
        )
    return max(usable)  # they begin with a date


class _Apt:
    """apt-get with lists and sources of its own."""

    def __init__(self, folder: Path, log: Path, sources: str):
        lists = folder / "apt" / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "apt" / "md_plugin.sources").write_text(sources)
        self.folder, self.log = folder, log
        settings = {
            "Dir::Etc::sourcelist": folder / "apt" / "md_plugin.sources",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": lists,
            "Dir::Cache": folder / "apt",
            "APT::Sandbox::User": "",  # apt's own user may not enter our folder
        }
        self.options = [word for k, v in settings.items() for word in ("-o", f"{k}={v}")]

    def run(self, program: str, *words: str) -> str:
        """Output of a call, also of one that fails."""
        command = [program, *self.options, *words]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, errors="replace", check=False
        )
        with self.log.open("a") as log:
            log.write(f"+ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        return done.stdout + done.stderr

    def versions(self, suites: tuple[str, ...]) -> list[str]:
        """Versions of the source package in the suites."""
        said = self.run("apt-get", "update", "--error-on=any")
        found = self.run("apt-cache", "showsrc", "--only-source", PACKAGE)
        versions = re.findall(r"^Version: (\S+)", found, re.MULTILINE)
        faults = re.findall(r"^E: (.*)", said, re.MULTILINE)
        if faults and not versions:
            raise MissingError(
                f"apt-get cannot read the source packages of {' '.join(suites)} ({faults[0]}); "
                f"{INSTEAD}"
            )
        return versions

    def tarball(self, version: str) -> tuple[str, str]:
        """Name and SHA256 of the original tarball."""
        said = self.run("apt-get", "source", "--print-uris", f"{PACKAGE}={version}")
        found = re.search(r"^'\S+' (\S+\.orig\.tar\.\w+) \d+ SHA256:(\w+)", said, re.MULTILINE)
        if not found:
            raise MissingError(
                f"apt-get names no original tarball of {PACKAGE} {version}, see {self.log}; "
                f"{INSTEAD}"
            )
        return found[1], found[2]
