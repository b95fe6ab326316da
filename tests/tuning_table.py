"""Makes md_plugin/data/tuning.json anew: python tests/tuning_table.py (minutes; no GPU needed).

For kernels of fused layers at usual shapes, and for A100 and H100: the usual options, and those one
step away, that compile with next to nothing in local memory. The usual ones come first where they
do, then by instructions issued per receiver, about: those of the compiled code, times warps, times
tiles of pairs and blocks of features and sensitivities that a receiver takes. To be made again
whenever the kernels change: until then the table is not used.
"""

import json
import sys
from math import ceil

import torch
from triton_assembly import assembly, findings

from md_plugin.kernels import triton_fused, triton_layer, tuning

SHAPES = ((1, 20, 64), (4, 20, 128), (9, 20, 64))
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")
ABSENT = ("species", "translation", "translations", "sent")  # in most steps
HALVES = ("z", "env", "ge")
N_PAIRS = 60
MOST_STACK = 32  # bytes: a few registers, written and read once


def compiled(kernel, capability, shape):
    """Findings of a kernel of two halves with the options that are being tried."""
    function, back = getattr(triton_layer, kernel + "_kernel"), kernel == "backward"
    env = torch.empty(2, 1, *shape, dtype=torch.float16, device="meta")
    radial = triton_fused.Radial(env.float(), env)
    constants = triton_fused.options(radial, env, back)
    options = {name: constants.pop(name) for name in LAUNCH}
    constants |= dict.fromkeys(ABSENT)
    constants = {k: v for k, v in constants.items() if k in function.arg_names}
    sizes = {"begin": 16, "n_send": 1601}
    return findings(assembly(function, "fp32", capability, constants, sizes, options, HALVES))


def issued(found, options, shape):
    """Instructions per receiver, about."""
    _, n_nu, n_feat = shape
    tiles = ceil(N_PAIRS / options["BLOCK_P"]) * ceil(n_nu / options["BLOCK_NU"])
    return found["lines"] * options["num_warps"] * tiles * ceil(n_feat / options["BLOCK_F"])


def clean(kernel, capability, shape):
    """Options that leave next to nothing in local memory, best first."""
    usual = triton_fused.tiles(*shape, torch.float32, kernel == "backward")
    usual = {name: usual[name] for name in tuning.NAMES}
    costs = []
    for options in [usual, *tuning.neighbours(usual)]:
        try:
            with tuning.trying(options):
                found = compiled(kernel, capability, shape)
        except Exception as error:
            sys.stderr.write(f"{kernel} {shape} {options}: {type(error).__name__}\n")
            continue
        if found["STACK"] <= MOST_STACK:
            costs.append((options != usual, issued(found, options, shape), options))
    return [options for _, _, options in sorted(costs, key=lambda cost: cost[:2])]


def main():
    table = {}
    for capability in (80, 90):
        rows = table[f"sm_{capability}"] = {}
        for shape in SHAPES:
            for kernel in ("forward", "backward"):
                found = clean(kernel, capability, shape)
                if found:
                    rows[tuning.key(kernel, (1, *shape), torch.float32)] = found
    lines = json.dumps({"kernels": tuning.checksum(), "options": table})
    tuning.SHIPPED.write_text(
        lines.replace('"sm_', '\n"sm_')
        .replace('"forward', '\n "forward')
        .replace('"backward', '\n "backward')
        + "\n"
    )


if __name__ == "__main__":
    main()
