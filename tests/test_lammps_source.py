"""What a build of LAMMPS starts from: the apt sources of a machine, a Kokkos of the user."""

import pytest

from lammps_interface import apt_source, lammps_compile
from lammps_interface.apt_source import MissingError
from lammps_interface.build import BuildError

DEB822 = """\
# the distribution
Types: deb
URIs: https://mirror.example/debian https://other.example/debian
Suites: bookworm bookworm-updates
# a remark
Components: main contrib
Signed-By: /keys/debian.gpg

Types: deb
URIs: https://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: https://node.example
Suites: nodistro
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
"""
ONE_LINE = """\
# deb https://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/keys/cloud.gpg] https://cloud.example/apt cloud main # why
deb-src https://mirror.example/debian bookworm main contrib
deb cdrom:[Debian]/ bookworm main
"""


@pytest.fixture
def sources(tmp_path):
    """A folder like /etc/apt."""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "readme.txt").write_text("deb https://no.example/ x main")
    return tmp_path


def test_both_formats_of_apt_sources_are_read(sources):
    entries = apt_source.apt_entries(sources)
    assert [entry.uri for entry in entries] == [
        "https://cloud.example/apt",
        "https://mirror.example/debian",
        "cdrom:[Debian]/",
        "https://mirror.example/debian",
        "https://other.example/debian",
        "https://node.example",
    ]
    assert entries[0].signed_by == "/keys/cloud.gpg"
    assert entries[1].components == ("main", "contrib")
    assert entries[3].suites == ("bookworm", "bookworm-updates")
    assert entries[3].signed_by == "/keys/debian.gpg"
    assert entries[5].signed_by.splitlines()[-1] == " mQINBF"


def test_source_packages_come_from_the_archive_of_the_distribution(sources):
    entry = apt_source.archive(apt_source.apt_entries(sources), "bookworm")
    assert entry.stanza(("sid", "testing")) == (
        "Types: deb-src\nURIs: https://mirror.example/debian\nSuites: sid testing\n"
        "Components: main contrib\n"
    )
    key = apt_source.apt_entries(sources)[5].stanza(("sid",))
    assert apt_source._deb822(key)[0].signed_by.endswith(" mQINBF")
    with pytest.raises(MissingError, match=r"no entry for its own suite \(trixie.*build PATH"):
        apt_source.archive(apt_source.apt_entries(sources), "trixie")
    assert apt_source.apt_entries(sources / "none") == []


def test_kokkos_of_the_user(tmp_path):
    with pytest.raises(BuildError, match=r"neither a Kokkos source tree .* nor an installation"):
        lammps_compile.find_kokkos(tmp_path)
    assert lammps_compile.find_kokkos(None) is None
    (tmp_path / "source" / "core" / "src").mkdir(parents=True)
    (tmp_path / "source" / "CMakeLists.txt").write_text(
        "set(Kokkos_VERSION_MAJOR 4)\nset(Kokkos_VERSION_MINOR 6)\nset(Kokkos_VERSION_PATCH 1)\n"
    )
    found = lammps_compile.find_kokkos(tmp_path / "source")
    assert (found.installed, found.version) == (False, "4.6.1")
    place = tmp_path / "installed" / "lib" / "cmake" / "Kokkos"
    place.mkdir(parents=True)
    (place / "KokkosConfig.cmake").touch()
    (place / "KokkosConfigVersion.cmake").write_text('set(PACKAGE_VERSION "5.1.0")\n')
    found = lammps_compile.find_kokkos(tmp_path / "installed")
    assert (found.path, found.installed, found.version) == (place, True, "5.1.0")
