"""docs/nanodft.md: its blocks run, its table of arguments and its map of files are complete."""

import re
from dataclasses import fields
from pathlib import Path

import nanodft_cases  # noqa: F401  skips where PySCF is absent
import pytest

import md_plugin.nanodft
from md_plugin.nanodft import Settings
from md_plugin.nanodft.functionals import METHODS

PAGE = (Path(__file__).parents[1] / "docs" / "nanodft.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, capsys):
    exec(compile(BLOCKS[number], f"block {number}", "exec"), {})
    energy = re.search(r"-20\d\d\.\d+", capsys.readouterr().out)
    assert energy, "water has about -2050 eV"


def test_there_are_blocks():
    assert len(BLOCKS) == 2


def test_arguments_are_described_with_their_defaults():
    table = dict(re.findall(r"^\| (`\w+`.*?) \| (.*?) \|", PAGE, flags=re.M))
    defaults = {}
    for names, values in table.items():
        found = re.findall(r"`(\w+)`", names)
        if set(found) <= {field.name for field in fields(Settings)} | {"dm0"}:
            texts = values.split(", ") if len(found) > 1 else [values]
            defaults |= dict(zip(found, texts, strict=True))
    for field in fields(Settings):
        text = defaults[field.name].strip("`").capitalize().lower()
        known = str(field.default).lower()
        assert text == known or float(text) == float(field.default), field.name
    assert all(f"`{name}`" in PAGE for name in METHODS)


def test_files_are_on_the_map():
    (table,) = re.findall(r"## How it is built\n\n(.*)", PAGE, flags=re.S)
    patterns = re.findall(r"`([\w*]+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, flags=re.M)))
    folder = Path(md_plugin.nanodft.__file__).parent
    assert "scf" in patterns
    for pattern in set(patterns) - {"nanodft"}:
        assert list(folder.glob(f"{pattern}.py")), f"there is no {pattern}.py"
