"""The heat capacity of tantalum from many crystals at many temperatures, all at once in torch-sim.

python torch_sim_batch.py                      # 6 x 54 atoms, half a minute on one core
python torch_sim_batch.py --steps 5000 --cells 6 --device cuda

In a classical crystal that is nearly harmonic the potential energy rises by 3/2 k_B per atom.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch_sim as ts
from ase.build import bulk

from md_plugin.torch_sim_model import HipnnModel

matplotlib.use("agg")
KELVIN = float(ts.units.MetalUnits.temperature)  # eV
FS = 0.001 * float(ts.units.MetalUnits.time)  # torch-sim's units of time


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ta", help="bundled model or .hipnn file")
    parser.add_argument("--cells", type=int, default=3, help="bcc cells along each edge")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("torch_sim_batch"))
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    model = HipnnModel(options.model, device=options.device, skin=0.7)
    model.compute_stress = False  # the volume is fixed
    kelvin = torch.arange(100.0, 700.0, 100.0, device=model.device, dtype=model.dtype)
    crystals = [bulk("Ta", cubic=True) * ([options.cells] * 3) for _ in kelvin]
    state = ts.io.atoms_to_state(crystals, model.device, model.dtype)

    number = {"device": model.device, "dtype": model.dtype}
    torch.manual_seed(0)
    start, step = ts.nvt_langevin(
        model,
        dt=torch.tensor(2 * FS, **number),
        kT=kelvin * KELVIN,
        gamma=torch.tensor(0.02 / FS, **number),
    )
    state = start(state, seed=0)
    perfect, seen = state.energy, []
    for k in range(options.steps):
        state = step(state)
        if k >= options.steps // 4:
            seen.append(state.energy)
    potential = (torch.stack(seen).mean(dim=0) - perfect) / state.n_atoms_per_system
    report(kelvin.cpu().numpy(), potential.cpu().numpy(), options.output)
    print(f"{state.n_atoms} atoms, neighbour lists built: {model.n_builds}")


def report(kelvin: np.ndarray, potential: np.ndarray, output: Path) -> None:
    """Table, slope and picture of the potential energy per atom against temperature."""
    import matplotlib.pyplot as plt

    header = "temperature (K)  potential energy above the perfect crystal (eV/atom)"
    table = np.column_stack([kelvin, potential])
    np.savetxt(output / "energy.txt", table, fmt="%12.5f", header=header)
    slope = float(kelvin @ potential / (kelvin @ kelvin)) / KELVIN
    rows = "\n".join(f"{T:15.0f}  {energy:8.4f}" for T, energy in table)
    print(f"{header}\n{rows}\nslope: {slope:.3f} k_B per atom; harmonic: 1.5")
    figure, axes = plt.subplots(layout="constrained")
    axes.plot(kelvin, potential, "o", label=f"slope {slope:.2f} $k_B$")
    axes.plot(kelvin, 1.5 * KELVIN * kelvin, label="harmonic: 3/2 $k_B$")
    axes.set(xlabel="temperature (K)", ylabel="potential energy (eV/atom)")
    axes.legend()
    figure.savefig(output / "energy.png", dpi=150)


if __name__ == "__main__":
    main()
