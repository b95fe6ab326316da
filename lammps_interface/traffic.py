"""CountedMLIAP: a potential in LAMMPS that counts and times its exchanges of features.

It computes what `HipnnMLIAP` does. Each rank writes traffic.RANK.json to the folder of the run,
one record for each step in which LAMMPS asks for energies, as in the first and the last of a run:

    steps                       evaluations, from the start of the process, as all that follows
    forward, reverse            exchanges, and bytes of the rows of this rank's ghost atoms
    exchange_seconds            in exchanges, waiting for other ranks included
    local, ghosts, peak_bytes   atoms now; largest memory of the process so far

The record of the first step, taken from that of the last, is what a run did.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lammps_interface.mliap import HipnnMLIAP


@dataclass
class Direction:
    """Exchanges in one direction, and bytes of ghost rows that went that way."""

    exchanges: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """What one rank has done so far; see the module page."""

    steps: int = 0
    forward: Direction = field(default_factory=Direction)
    reverse: Direction = field(default_factory=Direction)
    exchange_seconds: float = 0.0

    def watch(self, data: Any) -> None:
        """Count and time the exchanges of LAMMPS's data object from now on."""
        data.forward_exchange = self._counted(data, data.forward_exchange, self.forward)
        data.reverse_exchange = self._counted(data, data.reverse_exchange, self.reverse)

    def _counted(self, data: Any, exchange: Callable[..., None], of: Direction) -> Any:
        def counted(copy_from: Any, copy_to: Any, vec_len: int) -> None:
            start = time.perf_counter()
            exchange(copy_from, copy_to, vec_len)
            self.exchange_seconds += time.perf_counter() - start
            of.exchanges += 1
            of.bytes += (data.ntotal - data.nlocal) * vec_len * copy_to.itemsize

        return counted


class CountedMLIAP(HipnnMLIAP):
    """See the module page; made by `count_traffic`."""

    def _configure(self) -> None:
        super()._configure()
        self._traffic, self._watched = Traffic(), None
        self._records: list[dict[str, Any]] = []

    def compute_forces(self, data: Any) -> None:
        """One step of `HipnnMLIAP`, counted."""
        if self._watched is not data:
            self._traffic.watch(data)
            self._watched = data
        super().compute_forces(data)
        self._traffic.steps += 1
        if data.eflag:
            now = {"local": data.nlocal, "ghosts": data.ntotal - data.nlocal}
            self._records.append(asdict(self._traffic) | now | {"peak_bytes": peak_bytes()})
            file = Path(f"traffic.{self._rank_on_node}.json")
            file.write_text(json.dumps(self._records))


def count_traffic(path: Path) -> None:
    """Make the exported model of this file a `CountedMLIAP`, for pair_style mliap/py."""
    unified = torch.load(path, weights_only=False)
    counted = CountedMLIAP.__new__(CountedMLIAP)
    counted.__setstate__(unified.__getstate__())
    torch.save(counted, path)


def read_traffic(folder: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """The records of each rank that ran in this folder.

    Raises:
        ValueError: a rank has left none.
    """
    files = [folder / f"traffic.{rank}.json" for rank in range(ranks)]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{', '.join(missing)} missing: not every rank has run on this machine")
    return [json.loads(file.read_text()) for file in files]


def peak_bytes() -> int:
    """Largest memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
