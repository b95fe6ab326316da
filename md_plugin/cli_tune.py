"""The command `md-plugin tune`: how the kernels of a model are launched best on this GPU."""

from __future__ import annotations

import argparse
from typing import Any

from md_plugin.cli_models import DTYPES, say


def add_tune_command(commands: Any) -> None:
    """Add the command to the subparsers of `md-plugin`."""
    tune = commands.add_parser("tune", help="measure how kernels are launched best on this GPU")
    tune.add_argument("--model", default="ta", help=".hipnn file or bundled model; default: ta")
    tune.add_argument("--device", default="cuda", help="cuda (default), cuda:1 ...")
    tune.add_argument("--dtype", default="mixed", choices=DTYPES)
    tune.set_defaults(command=_tune)


def _tune(args: argparse.Namespace) -> None:
    from md_plugin.checkpoint import load_model
    from md_plugin.devices import choose_device

    device = choose_device(args.device)
    if device.type != "cuda":
        raise ValueError(
            f"kernels are tuned on a GPU, not on {device}; on a CPU there is nothing to choose"
        )
    potential = load_model(args.model, device=device, dtype=args.dtype, backend="triton")
    run_tune(potential.model.parts, device, fast=args.dtype == "fast")


def run_tune(networks: Any, device: Any, **settings: Any) -> None:
    """Tune, save, and say what was found; settings are those of `tuner.tune`."""
    from md_plugin.kernels import tuning
    from md_plugin.model.tuner import tune

    found = tune(networks, **settings)
    path = tuning.save(found.options, device)
    for name, options in found.options.items():
        usual, least = found.seconds[name]
        chosen = ", ".join(f"{k} {v}" for k, v in options.items())
        say(f"{name}: {usual * 1e6:.0f} -> {least * 1e6:.0f} us with {chosen}")
    for name, options, reason in found.discarded:
        chosen = ", ".join(f"{k} {v}" for k, v in options.items())
        say(f"discarded for {name}: {chosen}: {reason}")
    say(f"wrote {path}; models with layers of these shapes use it from now on")
