"""The command `md-plugin label`: energies and forces for a file of molecules.

Exit codes: 0 all frames have labels, 3 some failed (each with its reason in OUT.failed.jsonl), 2
the command or a file cannot be used.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from md_plugin.cli_models import say
from md_plugin.memory import keep_freed_memory

SOME_FAILED = 3


def add_label_command(commands: Any) -> None:
    """Add the command to the subparsers of `md-plugin`."""
    label = commands.add_parser("label", help="energies and forces for molecules, by nanodft")
    label.add_argument("input", type=Path, help="molecules, e.g. extended XYZ")
    label.add_argument("output", type=Path, help="extended XYZ; the same with energy and forces")
    label.add_argument("--xc", default="b3lyp", help="hf, svwn, b3lyp (default) or b3lyp5")
    label.add_argument("--basis", default="6-31g", help="6-31g (default) or sto-3g")
    label.add_argument("--grid-level", type=int, default=3, help="0 to 9; default: 3")
    label.add_argument("--charge", type=int, default=0, help="where a frame has no charge=...")
    label.add_argument("--device", default="auto", help="auto (default), cpu, cuda ...")
    label.add_argument("--backend", default="auto", help="auto, torch, numba, triton or libcint")
    label.add_argument("--max-memory-mb", type=float, default=1024, help="default: 1024")
    label.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    label.set_defaults(command=_label)


def _label(args: argparse.Namespace) -> int:
    keep_freed_memory()
    from md_plugin.nanodft.checks import Settings
    from md_plugin.nanodft.label import Labelling

    names = ("xc", "basis", "grid_level", "charge", "device", "backend", "max_memory_mb")
    settings = Settings(**{name: getattr(args, name) for name in names})
    run = Labelling(args.input, args.output, settings, resume=args.resume)
    n_frames, n_before = len(run.frames), len(run.frames) - len(run)
    _compute(run, n_frames, n_before)
    n_failed = len(run.failed)
    n_labelled = n_frames - n_failed
    say(f"{n_labelled} of {n_frames} frames labelled with {settings.method}: {args.output}")
    if n_failed:
        say(f"{n_failed} failed, reasons in {run.failures}")
    return SOME_FAILED if n_failed else 0


def _compute(run: Any, n_frames: int, n_before: int) -> None:
    """Work through the run under a progress bar."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("labelling"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[failed]} failed"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("label", total=n_frames, completed=n_before, failed=len(run.failed))
        for _ in run:
            bar.update(task, advance=1, failed=len(run.failed))
