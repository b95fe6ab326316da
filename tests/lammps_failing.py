"""A HIP-NN object for LAMMPS that fails on one rank; importable inside LAMMPS by PYTHONPATH."""

from lammps_interface.mliap import HipnnMLIAP


class FailsOnRankOne(HipnnMLIAP):
    """Fails on rank 1 in the first step, while the others go on."""

    def _compute(self, data, coupling):
        if self._native.rank == 1:
            raise ZeroDivisionError("the model has failed on purpose")
        super()._compute(data, coupling)
