"""HIP-NN neural-network potentials for molecular dynamics in LAMMPS and ASE.

Importing this package imports nothing heavy and changes nothing: no seed, dtype, environment
variable, thread count or device query. Names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Committee": "md_plugin.committee",
    "HipnnCalculator": "md_plugin.calculator",
    "Hipnn": "md_plugin.model.hipnn",
    "HipnnConfig": "md_plugin.model.config",
    "Pairs": "md_plugin.pairs",
    "Potential": "md_plugin.potential",
    "Structure": "md_plugin.neighbours",
    "export_hippynn": "md_plugin.hippynn_io",
    "from_hippynn": "md_plugin.hippynn_io",
    "import_hippynn": "md_plugin.hippynn_io",
    "to_hippynn": "md_plugin.hippynn_io",
    "load_model": "md_plugin.checkpoint",
    "save_model": "md_plugin.checkpoint",
    "neighbour_pairs": "md_plugin.neighbours",
    "use_backend": "md_plugin.kernels",
    "list_backends": "md_plugin.kernels",
    "get_backend": "md_plugin.kernels",
}

__all__ = [
    "Committee",
    "Hipnn",
    "HipnnCalculator",
    "HipnnConfig",
    "Pairs",
    "Potential",
    "Structure",
    "__version__",
    "export_hippynn",
    "from_hippynn",
    "get_backend",
    "import_hippynn",
    "list_backends",
    "load_model",
    "neighbour_pairs",
    "save_model",
    "to_hippynn",
    "use_backend",
]

if TYPE_CHECKING:
    from md_plugin.calculator import HipnnCalculator
    from md_plugin.checkpoint import load_model, save_model
    from md_plugin.committee import Committee
    from md_plugin.hippynn_io import export_hippynn, from_hippynn, import_hippynn, to_hippynn
    from md_plugin.kernels import get_backend, list_backends, use_backend
    from md_plugin.model.config import HipnnConfig
    from md_plugin.model.hipnn import Hipnn
    from md_plugin.neighbours import Structure, neighbour_pairs
    from md_plugin.pairs import Pairs
    from md_plugin.potential import Potential


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'md_plugin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
