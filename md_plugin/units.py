"""Units: one table from LAMMPS unit styles to the units of this project (eV, Å).

ASE's units are eV and Å as well, so only LAMMPS needs conversion. Factors follow from the exact
SI values of the elementary charge, the Avogadro constant and the thermochemical calorie
(2019 SI; LAMMPS manual, "units command").
"""

from __future__ import annotations

from dataclasses import dataclass

_ELEMENTARY_CHARGE = 1.602176634e-19  # C, exact
_AVOGADRO = 6.02214076e23  # 1/mol, exact
_CALORIE = 4.184  # J, thermochemical, exact
_HARTREE = 27.211386245988  # eV, CODATA 2018
_BOHR = 0.529177210903  # Å, CODATA 2018


@dataclass(frozen=True)
class UnitStyle:
    """How one LAMMPS unit style relates to eV and Å.

    Attributes:
        name: LAMMPS name.
        energy: eV per energy unit of the style.
        length: Å per length unit of the style.
    """

    name: str
    energy: float
    length: float

    @property
    def force(self) -> float:
        """eV/Å per force unit of the style."""
        return self.energy / self.length


UNIT_STYLES = {
    "metal": UnitStyle("metal", 1.0, 1.0),
    "real": UnitStyle("real", 1e3 * _CALORIE / (_AVOGADRO * _ELEMENTARY_CHARGE), 1.0),
}


# Units in which potentials are trained elsewhere: eV per unit of energy, Å per unit of length.
ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": UNIT_STYLES["real"].energy,
    "kJ/mol": 1e3 / (_AVOGADRO * _ELEMENTARY_CHARGE),
    "Hartree": _HARTREE,
    "Rydberg": 0.5 * _HARTREE,
}
LENGTH_UNITS = {"angstrom": 1.0, "Å": 1.0, "nm": 10.0, "bohr": _BOHR}


def unit_factor(unit: str | float, table: dict[str, float]) -> float:
    """Factor to eV or Å of a unit in ENERGY_UNITS or LENGTH_UNITS, or of a number.

    Raises:
        ValueError: neither a known name nor a positive number.
    """
    known = {name.lower(): value for name, value in table.items()}
    if isinstance(unit, str) and unit.lower() in known:
        return known[unit.lower()]
    try:
        factor = float(unit)
        if not 0 < factor < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"unit {unit!r} is not known; choose {', '.join(table)}, or give its value as a number"
        ) from None
    return factor


def unit_style(name: str) -> UnitStyle:
    """The unit style of that LAMMPS name.

    Raises:
        ValueError: a style that the models cannot be converted to.
    """
    if name not in UNIT_STYLES:
        raise ValueError(
            f"LAMMPS units {name!r} are not supported: the model is in eV and Å, which can be "
            f"converted to {' or '.join(UNIT_STYLES)}; write 'units metal' in the script"
        )
    return UNIT_STYLES[name]
