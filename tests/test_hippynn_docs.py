"""The blocks of docs/hippynn.md, run as they stand, beside a real experiment of hippynn."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
from hippynn_cases import hippynn_in_float64, needs_hippynn
from test_hippynn_files import SETTINGS

from md_plugin import cli, load_model

PAGE = (Path(__file__).parents[1] / "docs" / "hippynn.md").read_text()


def block(name):
    """The code after the mark of that name."""
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def run(name):
    """What the block prints, as numbers, and its variables."""
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block(name), name, "exec"), names)
    numbers = re.findall(r"-?\d+\.\d*(?:e-?\d+)?", out.getvalue())
    return np.array(numbers, dtype=float), names


@needs_hippynn
def test_there_here_and_back(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").symlink_to(experiment)
    with hippynn_in_float64():
        there, _ = run("there")
    here, _ = run("here")
    assert here.shape == there.shape == (1 + 3 * 32,)
    np.testing.assert_allclose(here, there, rtol=1e-7, atol=1e-10)  # printed digits
    assert cli.main(["export-hippynn", "alloy.hipnn", "-o", "folder"]) == 0
    _, names = run("back")
    model = load_model("alloy.hipnn", device="cpu").model
    weight = names["network"].torch_module.state_dict()["blocks.1.0.base_layer.selfint.weight"]
    assert torch.equal(weight, model.blocks[1][0].layer.self_interaction.weight)


def test_settings_are_those_of_the_experiment():
    units = {"energy_unit": "eV", "length_unit": "angstrom"}
    assert json.loads(block("settings")) == SETTINGS | units
