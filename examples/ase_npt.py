"""Heat a tantalum crystal at zero pressure with ASE: a table, a trajectory and a plot.

python ase_npt.py                       # 54 atoms, 300 -> 900 K, half a minute on one core
python ase_npt.py --steps 2000 --cells 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from ase import units
from ase.build import bulk
from ase.io.trajectory import Trajectory
from ase.md.nptberendsen import NPTBerendsen
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from md_plugin import HipnnCalculator

matplotlib.use("agg")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ta", help="bundled model or .hipnn file")
    parser.add_argument("--cells", type=int, default=3, help="bcc cells along each edge")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("ase_npt"))
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    atoms = bulk("Ta", cubic=True).repeat(options.cells)
    atoms.calc = HipnnCalculator(options.model, skin=0.7)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    dynamics = NPTBerendsen(
        atoms,
        timestep=2 * units.fs,
        temperature_K=300,
        pressure_au=0.0,
        taut=100 * units.fs,
        taup=500 * units.fs,
        compressibility_au=1 / (190 * units.GPa),
    )
    rows: list[tuple[float, float, float, float]] = []

    def sample() -> None:
        pressure = -np.trace(atoms.get_stress(voigt=False, include_ideal_gas=True)) / 3
        time = dynamics.get_time() / (1000 * units.fs)
        volume = atoms.get_volume() / len(atoms)
        rows.append((time, atoms.get_temperature(), volume, pressure / units.GPa))

    dynamics.attach(sample, interval=max(1, options.steps // 40))
    with Trajectory(options.output / "npt.traj", "w", atoms) as trajectory:
        dynamics.attach(trajectory.write, interval=max(1, options.steps // 40))
        for target in (300, 600, 900):
            dynamics.set_temperature(temperature_K=target)
            dynamics.run(options.steps // 3)
    table = np.array(rows)
    header = "time (ps)  temperature (K)  volume (Å^3/atom)  pressure (GPa)"
    np.savetxt(options.output / "npt.txt", table, fmt="%12.4f", header=header, encoding="utf-8")
    plot(table, options.output / "npt.png")
    builds = atoms.calc.neighbours.n_builds
    print(f"{header}\n{table[-1].round(3)}\nneighbour lists built: {builds}")


def plot(table: np.ndarray, path: Path) -> None:
    """Temperature and volume against time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, sharex=True, layout="constrained")
    axes[0].plot(table[:, 0], table[:, 1])
    axes[0].set_ylabel("temperature (K)")
    axes[1].plot(table[:, 0], table[:, 2])
    axes[1].set(xlabel="time (ps)", ylabel="volume (Å$^3$/atom)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
