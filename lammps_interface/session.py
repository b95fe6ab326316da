"""The Python side of pair_style mliap/py: one session for each pair style in a run.

The C++ class calls `open_session`, then `coeff` for pair_coeff and `compute` for every step.
Whatever these raise, LAMMPS ends the run on all ranks with the exception's text.

Optional attributes of a unified object that a session asks for:

    comm_width         largest number of features per atom in one exchange, in float64; 0 means
                       that it never exchanges. Without it, 64. Wider exchanges are split.
    begin_run(units, rank_on_node, ranks_on_node)      told before rcutfac is read
    warm_up(first)     compiles: told on one rank of each node, and after that on the others
    centroid           True if compute_forces fills data.cvatom where data.want_centroid is true
    n_models           members of a committee: where data.want_std is true, compute_forces fills
                       data.force_std and data.energy_std
    finds_pairs        True if it needs no list: LAMMPS then makes `row_ptr` and `sender` only when
                       they are read. Where data.whole_list is true they would hold every sender
                       within the cutoff and data.skin of a local atom; else they have to be read
    describe()         device, backend and precision, for the table of ranks
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import numpy as np

from lammps_interface.loader import load_unified
from lammps_interface.plugin_data import PluginData
from lammps_interface.ranks import HEADER, row
from lammps_interface.view import View, array_at, view_at
from md_plugin.memory import keep_freed_memory

DEFAULT_COMM_WIDTH = 64
OWNS_PROCESS: list[bool] = []  # filled by host.run, which starts Python for LAMMPS alone


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Faults of the input (ValueError) reach LAMMPS as they are, others with their traceback."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:  # sys.exit() and Ctrl-C have to end all ranks as well
        traceback.print_exc(file=sys.stderr)
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        # an interpreter inside lmp is never finalised, so nobody else flushes
        sys.stdout.flush()
        sys.stderr.flush()


class Session:
    """A loaded unified object and the data object that it is given in every step."""

    def __init__(self, view: View, name: str):
        self._view = view
        threads = ""
        if view.owns_process or OWNS_PROCESS:
            limit_threads(view.ranks_on_node)
            keep_freed_memory()
            threads = f", {os.environ['OMP_NUM_THREADS']} threads per rank"
        self.unified = load_unified(name)
        units = view.units.decode()
        if hasattr(self.unified, "begin_run"):
            self.unified.begin_run(units, view.node_rank, view.ranks_on_node)
        self.elements = [str(element) for element in self.unified.element_types]
        # LAMMPS's mliap unified gives every element the radius 1 and cuts at 2 radius rcutfac
        view.rcut = 2.0 * float(self.unified.rcutfac)
        view.comm_width = int(getattr(self.unified, "comm_width", DEFAULT_COMM_WIDTH))
        view.centroid = bool(getattr(self.unified, "centroid", False))
        view.n_models = int(getattr(self.unified, "n_models", 1))
        view.finds_pairs = bool(getattr(self.unified, "finds_pairs", False))
        if view.ghostneigh and not hasattr(self.unified, "comm_width"):
            raise ValueError(
                "pair_style mliap/py lists no neighbours of ghost atoms (ghostneigh 1); models "
                "of md_plugin need none, because features of ghosts are exchanged"
            )
        self.data = PluginData(
            view,
            elements=self.elements,
            ndescriptors=int(self.unified.ndescriptors or 0),
            nparams=int(self.unified.nparams or 0),
        )
        self.unified.interface = self
        self._first = True
        info = f"{self.unified!r} by the Python of {sys.prefix}{threads}"
        view.info = info.encode(errors="replace")[:511]

    @_reported()
    def coeff(self, names: str) -> None:
        """Maps atom types to elements.

        Args:
            names: one element name, or NULL, for each atom type, separated by spaces.
        """
        types = array_at(self._view.type_map, (self._view.ntypes,), np.int32)
        for k, name in enumerate(names.split()):
            if name == "NULL":
                types[k] = -1
            elif name in self.elements:
                types[k] = self.elements.index(name)
            else:
                raise ValueError(
                    f"the model has no element {name!r} (atom type {k + 1}); it knows "
                    f"{' '.join(self.elements)}"
                )
        if (types < 0).all():
            raise ValueError("pair_coeff maps no atom type to an element of the model")

    @_reported()
    def warm_up(self, _: str = "") -> None:
        """Called on one rank of each node, and after that on the others."""
        if hasattr(self.unified, "warm_up"):
            self.unified.warm_up(self._view.node_rank == 0)

    @_reported()
    def compute(self, _: str = "") -> None:
        """One evaluation; results are written into the view."""
        self.data.begin_step()
        if self._first:
            self._first = False
            self._introduce()
        self.unified.compute_descriptors(self.data)
        self.unified.compute_gradients(self.data)
        self.unified.compute_forces(self.data)

    def _introduce(self) -> None:
        """First step: checks the exchange, and fills this rank's row of the table of ranks."""
        # not at the top: torch is to be imported after limit_threads
        import torch

        from lammps_interface.exchange import check_exchange

        view, exchange = self._view, "none"
        if view.comm_width > 0:
            arrived = check_exchange(self.data, torch.device("cpu"), view.comm_width)
            view.exchange_missing = self.data.ntotal - arrived
            exchange = "checked"
        device, backend, dtype = getattr(self.unified, "describe", lambda: ("-", "-", "-"))()
        mpi = (view.mpi_library or b"").decode(errors="replace"), view.mpi_gpu_aware
        view.header = HEADER.encode()
        view.row = row(view.rank, device, backend, dtype, exchange, mpi).encode()[:159]


@_reported()
def open_session(address: int, name: str) -> Session:
    """Loads the model `name` for the pair style whose view is at `address`."""
    return Session(view_at(address), name)


def limit_threads(ranks_on_node: int) -> None:
    """Shares the cores of this process between the ranks of the node, where we own the process.

    OMP_NUM_THREADS, if set, wins, for torch and numba alike: ranks with more threads than cores
    spend their time waiting for each other. Both read the variables when they are imported.
    """
    cores = len(os.sched_getaffinity(0))
    share = str(max(1, cores // max(1, ranks_on_node)))
    threads = os.environ.setdefault("OMP_NUM_THREADS", share).split(",")[0]
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    import torch

    torch.set_num_threads(int(threads))
