"""Commands about model files: info, import-hippynn, export-hippynn; and `say`, for all commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md_plugin.elements import SYMBOLS, symbols

DTYPES = ("mixed", "float64", "float32", "fast")  # of `md_plugin.potential`, which imports torch


def add_model_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `md-plugin`."""
    info = commands.add_parser("info", help="what is in a model file")
    info.add_argument("model", help=".hipnn file or name of a bundled model")
    info.add_argument("--json", action="store_true", help="the whole header, as it is stored")
    info.set_defaults(command=_info)

    read = commands.add_parser("import-hippynn", help="make a .hipnn file of a hippynn model")
    read.add_argument(
        *("source",),
        nargs="+",
        type=Path,
        help="experiment folder, saved graph or ML-IAP pickle; or state dict, with --settings. "
        "Several make a committee",
    )
    read.add_argument("-o", "--output", type=Path, required=True, help="e.g. model.hipnn")
    read.add_argument(
        "--trust", action="store_true", help="execute the code in the files: they are pickles"
    )
    read.add_argument("--settings", type=Path, help="JSON that describes a state dict's network")
    read.add_argument("--energy", metavar="NAME", help="energy node, where there are several")
    read.add_argument("--energy-only", action="store_true", help="leave charges and such out")
    read.add_argument("--target", type=int, help="number of the energy, where a head has several")
    read.add_argument("--energy-unit", default=None, help="of the model; default: eV")
    read.add_argument("--length-unit", default=None, help="of the model; default: angstrom")
    read.set_defaults(command=_import_hippynn)

    write = commands.add_parser("export-hippynn", help="write what hippynn needs to load a model")
    write.add_argument("model", help=".hipnn file or name of a bundled model")
    write.add_argument("-o", "--output", type=Path, required=True, help="folder")
    write.set_defaults(command=_export_hippynn)


def _info(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from md_plugin.checkpoint import load_model, read_header

    header = read_header(args.model)
    if args.json:
        Console().print_json(json.dumps(header))
        return
    potential = load_model(args.model, device="cpu")
    n_parameters = sum(p.numel() for p in potential.model.parameters())
    table = Table("", "", title=escape(str(args.model)), show_header=False)
    table.columns[1].overflow = "fold"  # a hash is of no use with its end cut off
    for key, value in describe(header, n_parameters):
        table.add_row(escape(key), escape(value))
    Console().print(table)


def describe(header: Mapping[str, Any], n_parameters: int) -> list[tuple[str, str]]:
    """Rows (name, text) about a model, from the header of its file."""
    from md_plugin.model.config import HipnnConfig

    rows = []
    networks = header.get("networks") or [header["config"]]
    for number, values in enumerate(networks, start=1):
        if len(networks) > 1:
            rows.append((f"network {number} of {len(networks)}", ""))
        rows += _describe_network(HipnnConfig(**values))
    info = dict(header["info"])
    rows.append(("parameters", f"{n_parameters:,}"))
    units = header["units"]
    rows.append(("units", f"{units['energy']}, {units['length']}"))
    if "r_closest" in info:
        rows.append(("closest pair in training", f"{info.pop('r_closest')} Å"))
    for key in ("training", "origin", *sorted(set(info) - {"training", "origin"})):
        if key in info:
            rows += [(f"{key} {name}".rstrip(), text) for name, text in _flat(info[key])]
    rows.append(("format version", str(header["format_version"])))
    rows.append(("hash", header["hash"]))
    return rows


def _describe_network(c: Any) -> list[tuple[str, str]]:
    width = " -> ".join(map(str, c.widths[1:])) if isinstance(c.n_feat, tuple) else str(c.n_feat)
    inside = "residual" if c.residual else "not residual"
    if c.n_hidden is not None:
        inside += f", {' and '.join(map(str, dict.fromkeys(c.hidden_widths)))} wide inside"
    sensitivities = f"{c.n_nu}, Gaussians in 1/r under a squared-cosine cutoff"
    if c.n_gaussians is not None:
        sensitivities = f"{c.n_nu}, mixed from {c.n_gaussians} Gaussians in 1/r"
    known = c.reference_energies or (0.0,) * len(c.species)
    energies = (f"{SYMBOLS[z]} {energy:.6f}" for z, energy in zip(c.species, known, strict=True))
    cutoff = f"{c.rcut} Å"
    if c.pair_cutoff is not None:
        cutoff += f"; pairs end at {c.pair_cutoff} Å"
    return [
        ("model", c.kind),
        ("species", symbols(c.species)),
        ("cutoff", cutoff),
        ("interaction layers", f"{c.n_interactions}, each with {c.n_atom_layers} atom layers"),
        ("features per atom", width),
        ("sensitivities", sensitivities),
        ("layers", f"{c.activation}, {inside}"),
        ("reference energies", f"{', '.join(energies)} eV"),
    ]


def _flat(value: Any, front: str = "") -> list[tuple[str, str]]:
    """Nested data as rows: one for each innermost dictionary."""
    if not isinstance(value, dict):
        return [(front, str(value))]
    plain = {k: v for k, v in value.items() if not isinstance(v, dict)}
    rows = [(front, ", ".join(f"{k} {_short(v)}" for k, v in plain.items()))] if plain else []
    for key, inner in value.items():
        if isinstance(inner, dict):
            rows += _flat(inner, f"{front} {key}".strip())
    return rows


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _import_hippynn(args: argparse.Namespace) -> None:
    from md_plugin.checkpoint import save_model
    from md_plugin.committee import Committee
    from md_plugin.hippynn_io import import_hippynn

    units = {"energy_unit": args.energy_unit, "length_unit": args.length_unit}
    potential = import_hippynn(
        args.source,
        trust=args.trust,
        settings=args.settings,
        energy=args.energy,
        energy_only=args.energy_only,
        target=args.target,
        device="cpu",
        **{key: unit for key, unit in units.items() if unit is not None},
    )
    members = potential.members if isinstance(potential, Committee) else (potential,)
    paths = [args.output]
    if len(members) > 1:
        stem, suffix = args.output.stem, args.output.suffix
        paths = [args.output.with_name(f"{stem}-{k + 1}{suffix}") for k in range(len(members))]
    for path, member in zip(paths, members, strict=True):
        save_model(path, member)
        origin = member.info["origin"]
        say(f"wrote {path}: {member!r}")
        if "difference" in origin:
            say(f"energies of random atoms differ from hippynn's by {origin['difference']:.0e}")
    if args.energy_unit is None or args.length_unit is None:
        say(
            f"its unit of energy is taken as {origin['eV per energy unit']} eV, its unit of length "
            f"as {origin['angstrom per length unit']} Å; hippynn's own files do not say which they "
            "are: --energy-unit (kcal/mol, Hartree ...) and --length-unit do"
        )
    if len(paths) > 1:
        names = ", ".join(f'"{path}"' for path in paths)
        say(f"as a committee: HipnnCalculator([{names}])")


def _export_hippynn(args: argparse.Namespace) -> None:
    from md_plugin.hippynn_io import export_hippynn

    folder = export_hippynn(args.model, args.output)
    say(
        f"wrote {folder / 'network.pt'}, energy.pt and settings.json. In hippynn, with a network "
        "and an HEnergyNode of these settings:\n"
        f'    network.torch_module.load_state_dict(torch.load("{folder / "network.pt"}"))\n'
        f'    energy.torch_module.load_state_dict(torch.load("{folder / "energy.pt"}"))'
    )


def say(text: str) -> None:
    """Print as it is: brackets are no markup, and lines are the terminal's business."""
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)
