"""Units against ASE's table of constants and LAMMPS's names."""

import pytest
from ase import units

from md_plugin.units import UNIT_STYLES, unit_style


def test_metal_is_the_models_own():
    style = unit_style("metal")
    assert (style.energy, style.length, style.force) == (1.0, 1.0, 1.0)


def test_real_is_kcal_per_mol():
    style = unit_style("real")
    # ASE's constants are CODATA 2014, those of the table the exact ones of 2019: 1e-8 apart.
    assert style.energy == pytest.approx(units.kcal / units.mol, rel=1e-7)
    assert style.energy == pytest.approx(0.0433641042, rel=1e-8)
    assert style.length == 1.0 and style.force == style.energy


@pytest.mark.parametrize("name", ["lj", "si", "cgs", "electron", "micro", "nano", "Metal", ""])
def test_other_styles_are_refused(name):
    assert name not in UNIT_STYLES
    with pytest.raises(ValueError, match=r"not supported: .* metal or real; write 'units metal'"):
        unit_style(name)
