"""A rank among others: its GPU, its row in the table of ranks, and how it ends the whole run.

Ranks of one node share its GPUs: rank k of a node takes GPU k modulo their number, so that every
GPU is used before one is shared; k counts on the node, not through the run. Where a launcher shows
each rank one GPU, that one is taken. A GPU that was asked for and is not there is an error.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

MPICH_COMM_WORLD = 0x44000000  # fixed by the MPICH ABI, which libmpi.so.12 stands for
# Set by the launchers of MPICH and Intel MPI, Open MPI, MVAPICH, Slurm, Flux
_LOCAL_RANK = (
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
    "FLUX_TASK_LOCAL_ID",
)
HEADER = (
    f"{'rank':>5} {'host':<16} {'device':<22} {'backend':<8} {'dtype':<8} threads exchange   MPI"
)
GPU_AWARE = {1: "GPU-aware", 0: "not GPU-aware", -1: "GPU-aware: not said"}


def local_rank(fallback: int = 0) -> int:
    """Number of this rank among those of its node, from the launcher's environment."""
    for name in _LOCAL_RANK:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return fallback


def device_of_rank(asked: str, rank_on_node: int) -> torch.device:
    """The device on which a rank computes.

    Args:
        asked: "auto", "cpu", "cuda" (a GPU, or an error) or one GPU, "cuda:1".
        rank_on_node: number of this rank on its node.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    from md_plugin.devices import choose_device

    device = choose_device(asked)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", rank_on_node % torch.cuda.device_count())
    return device


def sharing(device: torch.device, asked: str, ranks_on_node: int) -> int:
    """How many ranks of this node compute on the GPU of this rank; 1 on a CPU."""
    import torch

    if device.type != "cuda":
        return 1
    if asked != "auto" and torch.device(asked).index is not None:
        return ranks_on_node  # one GPU was named for all
    count = torch.cuda.device_count()
    return len(range(device.index or 0, ranks_on_node, count))


def placed(device: torch.device, asked: str, ranks_on_node: int) -> str:
    """A device for the table of ranks, and how many ranks share it.

    A launcher may show each rank a GPU of its own, as cuda:0 (CUDA_VISIBLE_DEVICES): which one that
    is then stands there instead, and two rows with the same one share it.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if device.type == "cuda" and len(shown) == 1 and shown[0] and ranks_on_node > 1:
        return f"{device} (GPU {shown[0][:8]})"
    count = sharing(device, asked, ranks_on_node)
    return f"{device} ({count} ranks)" if count > 1 else str(device)


def row(
    rank: int, device: str, backend: str, dtype: str, exchange: str, mpi: tuple[str, int]
) -> str:
    """This rank's row under HEADER; `mpi` is the library's name and whether it is GPU-aware."""
    threads = os.environ.get("OMP_NUM_THREADS", "-").split(",")[0]
    library = f"{' '.join(mpi[0].split())[:40]} ({GPU_AWARE[mpi[1]]})"
    host = socket.gethostname().split(".")[0][:16]
    return (
        f"{rank:>5} {host:<16} {device[:22]:<22} {backend:<8} {dtype:<8} {threads:>7} "
        f"{exchange:<10} {library}"
    )


def end_all(error: BaseException, rank: int, n_ranks: int) -> NoReturn:
    """Ends the run of all ranks because of a fault of this one.

    LAMMPS's own couplings answer an exception with an error on all ranks, for which they then
    wait; the others wait in their own communication, forever. One rank alone simply raises.
    """
    if n_ranks <= 1:
        raise error
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"ERROR on proc {rank}: {error}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1.0)  # mpiexec kills its output forwarders at once, with whatever they still hold
    mpi = ctypes.CDLL(None)
    if hasattr(mpi, "ompi_mpi_comm_world"):  # Open MPI: a communicator is an address
        mpi.MPI_Abort(ctypes.byref(ctypes.c_char.in_dll(mpi, "ompi_mpi_comm_world")), 1)
    elif hasattr(mpi, "MPI_Abort"):
        mpi.MPI_Abort(ctypes.c_int(MPICH_COMM_WORLD), ctypes.c_int(1))
    os._exit(1)  # a launcher ends all ranks when one ends like this
