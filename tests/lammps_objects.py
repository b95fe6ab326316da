"""Unified objects for the tests of pair_style mliap/py; importable inside LAMMPS by PYTHONPATH."""

import sys

import numpy as np


class Base:
    """What an MLIAPUnified object is made of, without LAMMPS's base class."""

    comm_width = 0

    def __init__(self, elements, rcut, **settings):
        self.interface = None
        self.element_types = elements
        self.ndescriptors = 1
        self.nparams = 1
        self.rcutfac = rcut / 2
        self.__dict__.update(settings)

    def compute_descriptors(self, data):
        pass

    def compute_gradients(self, data):
        pass


class LJ(Base):
    """Lennard-Jones, the twin of pair_style lj/cut; through LAMMPS's own pair arrays."""

    epsilon = 0.0103
    sigma = 3.405

    def compute_forces(self, data):
        r2 = np.sum(data.rij**2, axis=1)
        s6 = self.sigma**6 / r2**3
        data.update_pair_energy(4 * self.epsilon * s6 * (s6 - 1))
        scale = 0.5 * 4 * self.epsilon * s6 * (6 - 12 * s6) / r2
        data.update_pair_forces(scale[:, None] * data.rij)


class Foreign(LJ):
    """Says nothing about exchanges, as objects of other projects."""

    def __getattribute__(self, name):
        if name == "comm_width":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Exchange(Base):
    """Exchanges features known from the position, and checks the adjoint identity.

    The total energy is sum over ranks of <G x, y> - <x, G^T y>, zero when reverse is the adjoint
    of forward.
    """

    comm_width = 8
    box = (1.0, 1.0, 1.0)
    use_torch = False

    def compute_forces(self, data):
        energy = 0.0
        for dtype, width in ((np.float64, 3), (np.float32, 5), (np.float64, 19), (np.float32, 1)):
            energy += self.check(data, dtype, width)
        data.energy = energy

    def check(self, data, dtype, width):
        phase = 2 * np.pi * data.x / np.array(self.box)
        columns = np.arange(width)
        known = np.cos(phase[:, columns % 3] * (1 + columns // 3)).astype(dtype)
        start = known.copy()
        start[data.nlocal :] = -7
        filled = np.empty_like(start)
        data.forward_exchange(*self.pass_on(start, filled), width)
        tolerance = 1e-5 if dtype == np.float32 else 1e-11
        np.testing.assert_allclose(filled, known, atol=tolerance)

        rng = np.random.default_rng(data.nlocal + width)
        y = rng.normal(size=known.shape).astype(dtype)
        back = np.empty_like(y)
        data.reverse_exchange(*self.pass_on(y, back), width)
        assert data.nlocal == 0 or not np.allclose(back, y)
        local = slice(0, data.nlocal)
        return float((filled.astype(float) * y).sum() - (known[local] * back[local]).sum())

    def pass_on(self, source, target):
        if not self.use_torch:
            return source, target
        import torch

        return torch.from_numpy(source), torch.from_numpy(target)


class Faulty(Base):
    """Fails in a chosen way on one rank while the others wait in an exchange."""

    comm_width = 4
    fault = "raise"
    rank = 0

    def compute_forces(self, data):
        rows = np.zeros((data.ntotal, 4))
        if self.interface._view.rank == self.rank:
            if self.fault == "raise":
                raise ZeroDivisionError("the model has failed on purpose")
            if self.fault == "strided":
                rows = np.zeros((data.ntotal, 8))[:, ::2]
            if self.fault == "dtype":
                rows = rows.astype(np.int64)
            if self.fault == "shape":
                rows = rows[:-1]
            if self.fault == "exit":
                sys.exit(0)
        data.forward_exchange(rows, np.zeros_like(rows), 4)


class Lossy(Base):
    """As if one ghost of this rank had not reached its owner in the check of the exchange."""

    def compute_forces(self, data):
        self.interface._view.exchange_missing = 1


class Where(Base):
    """Tells which Python runs and on how many threads."""

    def compute_forces(self, data):
        import os

        sys.stdout.write(f"\nprefix {sys.prefix} threads {os.environ['OMP_NUM_THREADS']}\n")
        assert "mpi4py" not in sys.modules


class Mixture(Base):
    """Lennard-Jones with its own numbers for each pair of elements: types must arrive right."""

    epsilon = ((0.0103, 0.0118), (0.0118, 0.014))
    sigma = ((3.405, 3.52), (3.52, 3.65))
    update = "update_pair_forces"  # KOKKOS offers it with the ending _gpu as well

    def compute_forces(self, data):
        kinds = data.elems[data.pair_i], data.jelems
        epsilon, sigma = np.array(self.epsilon)[kinds], np.array(self.sigma)[kinds]
        r2 = np.sum(data.rij**2, axis=1)
        s6 = sigma**6 / r2**3
        data.update_pair_energy(4 * epsilon * s6 * (s6 - 1))
        scale = 0.5 * 4 * epsilon * s6 * (6 - 12 * s6) / r2
        getattr(data, self.update)(scale[:, None] * data.rij)


def memory():
    """Largest and present resident memory of this process, bytes."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return [1024 * int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS")]


class Counting:
    """Wraps a unified object: every rank writes a line for each step, and may fail in one.

    Columns of counts.RANK: step, local atoms, atoms, pairs, exchanges forward and reverse since
    the step before, largest resident memory of the process so far and resident memory, in bytes.
    """

    def __init__(self, inner, fault=(-1, -1)):
        self.inner = inner
        self.fault = fault

    def __getattr__(self, name):
        if name == "inner":  # asked for while a pickle is read
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def interface(self):
        return self.inner.interface

    @interface.setter
    def interface(self, session):
        self.inner.interface = session
        self.counts = [0, 0]
        for k, name in enumerate(("forward_exchange", "reverse_exchange")):
            setattr(session.data, name, self.counted(k, getattr(session.data, name)))

    def counted(self, k, exchange):
        def call(*arguments):
            self.counts[k] += 1
            return exchange(*arguments)

        return call

    def compute_forces(self, data):
        rank = self.interface._view.rank
        if (rank, data.step) == self.fault:
            raise ZeroDivisionError(f"the model has failed in step {data.step}")
        self.inner.compute_forces(data)
        row = [data.step, data.nlocal, data.ntotal, len(data.sender), *self.counts, *memory()]
        self.counts[:] = 0, 0
        with open(f"counts.{rank}", "a") as out:
            out.write(" ".join(map(str, row)) + "\n")


class Unloadable(Base):
    """Cannot be prepared on one rank."""

    rank = 0

    def begin_run(self, units, rank_on_node, ranks_on_node):
        if rank_on_node == self.rank:
            raise OSError(f"no memory left for rank {rank_on_node} of {ranks_on_node}")

    def compute_forces(self, data):
        pass


class Breaking(Counting):
    """Fails between the two exchanges of a step, on the rank and in the step of `fault`."""

    def compute_forces(self, data):
        if (self.interface._view.rank, data.step) == self.fault:

            def broken(*_):
                raise ArithmeticError(f"the way back is broken in step {data.step}")

            data.reverse_exchange = broken
        self.inner.compute_forces(data)
