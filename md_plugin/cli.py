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
from md_plugin.cli_label import add_label_command
from md_plugin.cli_models import DTYPES, add_model_commands, say
from md_plugin.cli_tune import add_tune_command
from md_plugin.memory import keep_freed_memory

USER_ERRORS = (ValueError, OSError, RuntimeError, KeyError, ImportError)
# Those of the registry, which imports torch; they need not be available where one exports.
BACKENDS = ("auto", "torch", "numba", "triton", "cupy", "numba_cuda")


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
    export.add_argument(
        "model", nargs="+", help=".hipnn file or bundled model; several act as a committee"
    )
    export.add_argument("-o", "--output", type=Path, required=True, help="e.g. model.pt")
    export.add_argument("--dtype", default="mixed", choices=DTYPES)
    export.add_argument("--device", default="auto")
    export.add_argument("--backend", default=None, choices=BACKENDS)
    export.set_defaults(command=_export)

    _add_bench(commands)
    add_model_commands(commands)
    add_label_command(commands)
    add_tune_command(commands)

    backends = commands.add_parser("backends", help="kernels that are available, and why not")
    backends.set_defaults(command=_backends)

    _add_checks(commands)
    _add_lammps(commands)
    commands.add_parser("lmp", help="run LAMMPS inside this Python: md-plugin lmp -in in.script")
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure against hippynn, same weights, same run")
    bench.add_argument(
        "cases", nargs="*", metavar="CASE", help="see --list; default: the main ones"
    )
    bench.add_argument("-o", "--output", type=Path, help="folder for bench.json, .md and .png")
    bench.add_argument("--atoms", type=int, default=None, help="default: 2000; the nearest crystal")
    bench.add_argument("--rounds", type=int, default=None, help="timed rounds; default: 7")
    bench.add_argument("--threads", default="1", help="2, or 1,2, or 1,all; default: 1")
    bench.add_argument("--quick", action="store_true", help="tiny sizes: does everything work?")
    bench.add_argument("--list", action="store_true", help="name the cases and end")
    bench.add_argument("--device", default="cuda", help="of the case gpu: cuda (default), cuda:1")
    bench.add_argument("--only", default="", help="of the case gpu, some parts: A,C,loop")
    bench.add_argument("--limit", type=float, default=300.0, help="of the case gpu: s, per part")
    bench.set_defaults(command=_bench)

    scaling = commands.add_parser("scaling", help="fit and predict from what bench ranks measured")
    scaling.add_argument("measured", type=Path, help="bench.json of: bench ranks -o FOLDER")
    scaling.add_argument("-o", "--output", type=Path, required=True, help="folder of scaling.*")
    scaling.set_defaults(command=_scaling)


def _add_checks(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="what works on this machine, and why not")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.add_argument("--no-run", action="store_true", help="start no other programs")
    doctor.set_defaults(command=_doctor)

    validate = commands.add_parser("validate", help="compare a LAMMPS with Python")
    validate.add_argument("model", help=".hipnn file, name of a bundled model, or exported .pt")
    validate.add_argument("--lmp", type=Path, help="LAMMPS program; default: this environment's")
    validate.add_argument("-np", type=int, default=1, dest="ranks", help="MPI ranks")
    validate.add_argument("--suffix", choices=("py", "kk", "none"), help="default: by its packages")
    validate.add_argument("--dtype", choices=DTYPES)
    validate.add_argument("--mpiexec", type=Path, help="default: the one beside lmp, then on PATH")
    validate.add_argument("--keep", type=Path, help="folder for scripts, data and output")
    validate.add_argument("--limit", type=float, default=300.0, help="s, for one structure")
    validate.set_defaults(command=_validate)


def _add_lammps(commands: Any) -> None:
    lammps = commands.add_parser("lammps", help="build LAMMPS with ML-IAP and Python")
    actions = lammps.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = actions.add_parser(
        "build", help="compile, check and keep a LAMMPS; see docs/lammps_build.md"
    )
    build.add_argument(
        "source", nargs="?", type=Path, help="source tree or tarball; default: Debian's package"
    )
    build.add_argument(
        "--version", help="Debian suite (trixie) or version (20250204); default: the newest"
    )
    build.add_argument("--kokkos", type=Path, metavar="PATH", help="Kokkos source or installation")
    build.add_argument("--no-kokkos", action="store_true", help="also if the source has Kokkos")
    build.add_argument(
        *("-D", "--define"), action="append", default=[], metavar="NAME=VALUE", help="for cmake"
    )
    build.add_argument("-j", "--jobs", type=int, default=0, help="default: one for each core")
    build.add_argument("--force", action="store_true", help="build again")
    build.add_argument("--keep-source", action="store_true", help="keep source and object files")
    build.add_argument("--no-harness", action="store_true", help="without LAMMPS's pair tester")
    build.set_defaults(command=_lammps_build)

    plugin = actions.add_parser("plugin", help="compile pair_style mliap/py for another LAMMPS")
    plugin.add_argument(
        "source", nargs="?", type=Path, help="its source tree; default: that of lammps build"
    )
    plugin.add_argument("--mpi", type=Path, help="folder of its mpi.h; default: MPICH's")
    plugin.add_argument("--bigbig", action="store_true", help="it has 64-bit atom ids")
    plugin.set_defaults(command=_lammps_plugin)


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
    say(
        f"wrote {args.output}; in a LAMMPS script:\n"
        f"    pair_style mliap unified {args.output} 0\n"
        "    pair_coeff * * ELEMENT ...\n"
        "and run it with: lmp -sf py -in in.script"
    )


def _bench(args: argparse.Namespace) -> None:
    if "gpu" in args.cases:  # needs neither ase nor lammps, which others do
        _bench_gpu(args)
        return
    from md_plugin.bench.cases import list_cases
    from md_plugin.bench.core import Options
    from md_plugin.bench.run import run_bench, thread_counts

    if args.list:
        say("\n".join(list_cases()))
        return
    # With --quick, unless they are said: a small crystal, and as few rounds as have quantiles.
    atoms = args.atoms if args.atoms is not None else 108 if args.quick else 2000
    rounds = args.rounds if args.rounds is not None else 2 if args.quick else 7
    options = Options(
        atoms=atoms,
        rounds=rounds,
        quick=args.quick,
        kept=keep_freed_memory(),  # for all providers
    )
    run_bench(args.cases, options, args.output, thread_counts(args.threads))


def _bench_gpu(args: argparse.Namespace) -> None:
    from md_plugin.bench.gpu import device_options, run_device_bench

    if args.cases != ["gpu"] or args.atoms is not None or args.threads != "1":
        raise ValueError(
            "bench gpu runs alone: it takes neither other cases nor --atoms nor --threads"
        )
    options = device_options(
        args.device, rounds=args.rounds, quick=args.quick, kept=keep_freed_memory()
    )
    only = tuple(filter(None, args.only.split(",")))
    run_device_bench(options, args.output, only, args.limit)


def _scaling(args: argparse.Namespace) -> None:
    from md_plugin.bench.scaling import write

    say("wrote " + ", ".join(map(str, write(args.measured, args.output))))


def _backends(args: argparse.Namespace) -> None:
    from md_plugin.kernels import list_backends

    for name, reason in list_backends().items():
        say(f"{name:12s}{'available' if not reason else 'absent: ' + reason}")


def _doctor(args: argparse.Namespace) -> int:
    from lammps_interface.doctor import run_doctor

    return run_doctor(as_json=args.json, start=not args.no_run)


def _validate(args: argparse.Namespace) -> int:
    from lammps_interface.validate import run_validate
    from lammps_interface.validate_lammps import Settings

    names = ("lmp", "ranks", "suffix", "dtype", "mpiexec", "limit")
    settings = Settings(**{name: getattr(args, name) for name in names})
    return run_validate(args.model, settings, keep=args.keep)


def _lammps_build(args: argparse.Namespace) -> None:
    from lammps_interface.lammps_build import BuildOptions, build_lammps

    built = build_lammps(
        BuildOptions(
            source=args.source,
            wanted=args.version,
            kokkos=args.kokkos,
            no_kokkos=args.no_kokkos,
            defines=tuple(args.define),
            jobs=args.jobs,
            force=args.force,
            keep_source=args.keep_source,
            harness=not args.no_harness,
        )
    )
    say(built.summary)


def _lammps_plugin(args: argparse.Namespace) -> None:
    from lammps_interface.build import ensure_plugin
    from lammps_interface.lammps_plugin import target_of

    target = target_of(args.source, args.mpi, bigbig=args.bigbig)
    folder = ensure_plugin(target)
    say(
        f"pair_style mliap/py for LAMMPS {target.version}, which needs the package PLUGIN:\n"
        f"    export LAMMPS_PLUGIN_PATH={folder}\n"
        "    lmp -sf py -in in.script"
    )


if __name__ == "__main__":
    sys.exit(main())
