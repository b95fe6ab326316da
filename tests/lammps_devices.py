"""Unified objects that run as on a GPU, on the CPU; importable inside LAMMPS by PYTHONPATH."""

import sys

import torch

from lammps_interface.mliap import HipnnMLIAP
from md_plugin.devices import Staging


class OnDevice(HipnnMLIAP):
    """Sends positions, finds pairs by itself, exchanges through staging memory; LAMMPS lists none.

    Columns of crossed.RANK: local atoms, atoms, bytes of positions, bytes that exchanges sent up,
    how often there was a new list, pairs that LAMMPS has listed so far.
    """

    finds_pairs = True

    def _prepare(self, data):
        coupling = super()._prepare(data)
        self._staging = Staging(torch.device("cpu"))
        return coupling

    def compute_forces(self, data):
        super().compute_forces(data)
        row = [data.nlocal, data.ntotal]
        row += [self._geometry.staging.n_bytes, self._staging.n_bytes]
        row += [data.list_count, data._view.n_pair]
        self._geometry.staging.n_bytes = self._staging.n_bytes = 0
        with open(f"crossed.{data._view.rank}", "a") as out:
            out.write(" ".join(map(str, row)) + "\n")


class Compiling(HipnnMLIAP):
    """Writes down how often numba compiled before the first step, and after it; then ends."""

    def __setstate__(self, state):
        from numba.core import event

        self.listener = event.RecordingListener()
        event.register("numba:compile", self.listener)
        super().__setstate__(state)

    def warm_up(self, first):
        super().warm_up(first)
        self.count = len(self.listener.buffer)

    def compute_forces(self, data):
        super().compute_forces(data)
        with open(f"compiled.{data._view.rank}", "a") as out:
            out.write(f"{self.count} {len(self.listener.buffer)}\n")


class Uncompilable(HipnnMLIAP):
    """The first rank of the node cannot compile."""

    def warm_up(self, first):
        if first:
            raise OSError("no space left for compiled code")
        sys.stdout.write("another rank compiles\n")
