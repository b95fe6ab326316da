"""The command line: `md-plugin COMMAND`. Parses, calls one function of another room, prints.

A user's mistake (missing file, unknown element, bad setting) ends with one sentence on stderr and
exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from md_plugin import __version__
from md_plugin.memory import keep_freed_memory

USER_ERRORS = (ValueError, OSError, RuntimeError, KeyError, ImportError)
# Those of the registry, which imports torch; they need not be available where one exports.
BACKENDS = ("auto", "torch", "numba", "triton", "cupy")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `md-plugin`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["lmp"]:  # everything behind it belongs to LAMMPS
        from lammps_interface.host import run

        return int(run(arguments[1:]))
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("md_plugin").setLevel(logging.INFO)
    try:
        return int(args.command(args) or 0)
    except USER_ERRORS as error:
        if args.debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.stderr.write(f"md-plugin: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("md-plugin: interrupted\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="md-plugin", description="HIP-NN neural-network potentials in LAMMPS and ASE."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument("--version", action="version", version=f"md-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="tantalum MD in ASE and LAMMPS, with table and plot")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"))
    demo.add_argument("--steps", type=int, default=300, help="MD steps in each engine")
    demo.set_defaults(command=_demo)

    train = commands.add_parser("train", help="train a model on extended XYZ files")
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    train.add_argument("-o", "--output", type=Path, help="folder; overrides the one in the config")
    train.set_defaults(command=_train)

    export = commands.add_parser("export", help="write the file that pair_style mliap reads")
    export.add_argument("model", help=".hipnn file or name of a bundled model")
    export.add_argument("-o", "--output", type=Path, required=True, help="e.g. model.pt")
    export.add_argument("--dtype", default="mixed", choices=("mixed", "float64", "float32"))
    export.add_argument("--device", default="auto")
    export.add_argument("--backend", default=None, choices=BACKENDS)
    export.set_defaults(command=_export)

    bench = commands.add_parser("bench", help="measure against hippynn, same weights, same run")
    bench.add_argument("-o", "--output", type=Path, help="folder for JSON and PNG")
    bench.add_argument("--atoms", type=int, default=2048)
    bench.add_argument("--rounds", type=int, default=7)
    bench.set_defaults(command=_bench)

    info = commands.add_parser("info", help="what is in a model file")
    info.add_argument("model", help=".hipnn file or name of a bundled model")
    info.set_defaults(command=_info)

    backends = commands.add_parser("backends", help="kernels that are available, and why not")
    backends.set_defaults(command=_backends)

    commands.add_parser("lmp", help="run LAMMPS inside this Python: md-plugin lmp -in in.script")
    return parser


def _demo(args: argparse.Namespace) -> None:
    keep_freed_memory()
    from md_plugin.demo import run_demo

    run_demo(args.output, steps=args.steps)


def _train(args: argparse.Namespace) -> None:
    keep_freed_memory()
    from md_plugin.training import train_from_config

    train_from_config(args.config, resume=args.resume, output=args.output)


def _export(args: argparse.Namespace) -> None:
    from lammps_interface import export_mliap

    export_mliap(
        args.model, args.output, dtype=args.dtype, device=args.device, backend=args.backend
    )
    _say(
        f"wrote {args.output}; in a LAMMPS script:\n"
        f"    pair_style mliap unified {args.output} 0\n"
        "    pair_coeff * * ELEMENT ...\n"
        "and run it with: lmp -sf py -in in.script"
    )


def _bench(args: argparse.Namespace) -> None:
    from md_plugin.bench import run_bench

    run_bench(args.atoms, args.rounds, args.output)


def _info(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from md_plugin.checkpoint import load_model, read_header

    header = read_header(args.model)
    potential = load_model(args.model, device="cpu")
    n_parameters = sum(p.numel() for p in potential.model.parameters())
    table = Table("", "", title=escape(str(args.model)), show_header=False)
    table.columns[1].overflow = "fold"  # a hash is of no use with its end cut off
    rows: dict[str, Any] = {"parameters": n_parameters, "units": header["units"]}
    rows |= {k: v for part in ("config", "info") for k, v in header[part].items()}
    rows |= {"format version": header["format_version"], "hash": header["hash"]}
    for key, value in rows.items():
        table.add_row(escape(str(key)), escape(str(value)))
    Console().print(table)


def _backends(args: argparse.Namespace) -> None:
    from md_plugin.kernels import list_backends

    for name, reason in list_backends().items():
        _say(f"{name:8s}{'available' if not reason else 'absent: ' + reason}")


def _say(text: str) -> None:
    """Print as it is: brackets are no markup, and lines are the terminal's business."""
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
