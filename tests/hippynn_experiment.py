"""Fixture: an experiment that hippynn itself has trained and saved; once per session, 20 s."""

import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(__file__).with_name("hippynn_training.py")


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Folder of a training run of hippynn; see hippynn_training.py for what is in it."""
    from hippynn_cases import HIPPYNN

    if HIPPYNN:
        pytest.skip(HIPPYNN)
    folder = tmp_path_factory.mktemp("hippynn") / "experiment"
    done = subprocess.run(
        [sys.executable, TRAINER, folder], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
