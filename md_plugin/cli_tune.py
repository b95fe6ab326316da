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
    """Tune, and say and save what was found, kernel by kernel; settings are those of `tune`."""
    from md_plugin.kernels import tuning
    from md_plugin.model.tuner import tune

    def told(name: str, found: Any) -> None:
        tuning.save({name: found.options[name]}, device)  # at once: this may be cut off
        usual, least = found.seconds[name]
        chosen = ", ".join(f"{k} {v}" for k, v in found.options[name].items())
        say(f"{name}: {usual * 1e6:.0f} -> {least * 1e6:.0f} us with {chosen}")

    found = tune(networks, told=told, **settings)
    for name, options, reason in found.discarded:
        chosen = ", ".join(f"{k} {v}" for k, v in options.items())
        say(f"discarded for {name}: {chosen}: {reason}")
    say(f"wrote {tuning.file_of(device)}; models with layers of these shapes use it from now on")
