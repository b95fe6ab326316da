"""The rules of the house: floors, rooms of third-party packages, light imports, sizes.

Everything is read from the source by `ast`; a broken rule shows as file, line and what is wrong.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("md_plugin", "lammps_interface")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}

# A room imports from the floors below its own; on one floor, as long as there is no cycle.
FLOORS = {
    0: ("units", "elements", "memory", "devices", "pairs", "halo", "ordering"),
    1: (
        "kernels.compiled",
        "kernels.reference",
        "kernels.numba_cpu",
        "kernels.numba_rows",
        "kernels.numba_products",
        "kernels.simd",
        "kernels.tiles",
        "kernels.triton_*",
        "kernels.tuning",
        "kernels.cuda_launch",
        "kernels.cupy_gpu",
        "kernels.numba_cuda",
        "kernels.numba_cuda_*",
        "kernels.vector_ir",
        "kernels.vector_math",
        "kernels.fused_*",
        "kernels.softplus_cpu",
        "kernels.norms_cpu",
        "kernels.workers",
        "kernels.radial_*",
    ),
    2: (
        "kernels",
        "kernels.closure",
        "kernels.sensitivity",
        "kernels.self_check",
        "kernels.registry",
    ),
    3: ("model", "model.*", "neighbours", "batch_neighbours", "device_neighbours", "evaluation"),
    4: ("potential", "committee"),
    5: ("checkpoint", "hippynn_io", "hippynn_io.*"),
    6: (
        "calculator",
        "torch_sim_model",
        "data",
        "training",
        "training_*",
        "bench",
        "bench.*",
        "scaling",
        "demo",
        "demo_*",
        "nanodft",
        "nanodft.*",
    ),
    7: ("cli", "cli_*"),
}
LAZY_TO_LAMMPS = {"md_plugin.cli", "md_plugin.demo", "md_plugin.bench.lammps"}
LAZY_TO_LAMMPS |= {"md_plugin.bench.race", "md_plugin.bench.ranks"}  # all of them in functions only

# Package -> where it may be imported. torch and numpy are everywhere above floor 0's tables.
ROOMS = {
    "ase": (
        "md_plugin.calculator",
        "md_plugin.data",
        "md_plugin.bench*",
        "md_plugin.demo*",
        "md_plugin.nanodft.molecule",
        "md_plugin.nanodft.calculator",
        "md_plugin.nanodft.label",
        "lammps_interface.doctor_child",
    ),
    "vesin": ("md_plugin.neighbours",),
    # the kernels; elsewhere only to say how many threads they get
    "numba": (
        "md_plugin.kernels.compiled",
        "md_plugin.kernels.numba_*",
        "md_plugin.kernels.simd",
        "md_plugin.kernels.tiles",
        "md_plugin.kernels.vector_ir",
        "md_plugin.kernels.fused_*",
        "md_plugin.kernels.softplus_cpu",
        "md_plugin.kernels.radial_cpu",
        "md_plugin.nanodft.numba_*",
        "md_plugin.training*",
        "md_plugin.bench*",
        "md_plugin.demo*",
    ),
    "llvmlite": (
        "md_plugin.kernels.simd",
        "md_plugin.kernels.tiles",
        "md_plugin.kernels.vector_ir",
        "md_plugin.kernels.fused_*",
        "md_plugin.kernels.radial_ir",
    ),
    "triton": ("md_plugin.kernels.triton_*", "md_plugin.nanodft.triton_*"),
    "cupy": ("md_plugin.kernels.cupy_gpu",),
    "safetensors": ("md_plugin.checkpoint",),
    "hippynn": ("md_plugin.hippynn_io*", "md_plugin.bench*"),
    "yaml": ("md_plugin.training_config",),
    "rich": (
        "md_plugin.cli*",
        "md_plugin.training*",
        "md_plugin.bench*",
        "md_plugin.demo*",
        "lammps_interface.doctor",
        "lammps_interface.validate",
    ),
    "matplotlib": ("md_plugin.training_report", "md_plugin.bench*", "md_plugin.demo*"),
    "pyscf": ("md_plugin.nanodft.basis", "md_plugin.nanodft.grid", "md_plugin.bench.nanodft"),
    "lammps": ("lammps_interface.*",),
    "mpi4py": ("lammps_interface.*",),
    "torch_sim": ("md_plugin.torch_sim_model",),
    "torch": ("*",),
    "numpy": ("*",),
}
NO_PACKAGES = ("md_plugin", "md_plugin.units", "md_plugin.elements", "lammps_interface")
NO_PACKAGES += ("md_plugin.memory",)
NO_PACKAGES += ("lammps_interface.entry", "lammps_interface.build")  # run at each start of LAMMPS
OPTIONAL = ("hippynn", "cupy", "triton", "pyscf", "torch_sim")
OWN_FILES = ("triton_gpu", "cupy_gpu", "torch_sim_model")  # made of an optional package
OWN_FILES += ("triton_parts", "triton_radial", "triton_pairs", "triton_layer", "triton_fused")
OWN_FILES += ("fused_device", "numba_cuda", "model.tuner")
OWN_FILES += ("triton_products", "triton_eri", "triton_gradient")
OWN_FILES += ("triton_arrays", "triton_mirror", "fused_check", "triton_halves", "triton_matmul")
OWN_FILES += ("triton_matmul_kernels",)
OWN_FILES += ("triton_atoms", "triton_atom_layers", "device_atoms")

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 300, 50, 6


def matches(name, patterns):
    return any(name == p or (p[-1] == "*" and name.startswith(p[:-1])) for p in patterns)


def floor_of(module):
    """Floor of a module of md_plugin."""
    name = module.removeprefix("md_plugin.")
    return next((n for n, rooms in FLOORS.items() if matches(name, rooms)), None)


def imports(module):
    """(line, imported module, whether inside a function) of each import, type checking left out."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield child.lineno, alias.name, inside
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno} is a relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield child.lineno, full if full in FILES else child.module, inside
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, inside or function)

    return list(walk(TREES[module], False))


def ours(module):
    """The imports of other modules of this project."""
    return [(line, name, inside) for line, name, inside in imports(module) if name in FILES]


def functions(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("module", [m for m in FILES if m.startswith("md_plugin.")])
def test_imports_go_down(module):
    floor = floor_of(module)
    assert floor is not None, f"{module} has no floor yet: say in FLOORS where it belongs"
    for line, name, inside in ours(module):
        place = f"{FILES[module]}:{line} imports {name}"
        if name.split(".")[0] == "lammps_interface":
            assert module in LAZY_TO_LAMMPS and inside, f"{place}, which only cli and demo may"
        elif name != "md_plugin":  # the root holds the version and lazy names
            assert floor_of(name) <= floor, f"{place}, which is above it"


def test_every_room_on_the_plan_exists_or_is_announced():
    rooms = {m.removeprefix("md_plugin.") for m in FILES if m.startswith("md_plugin.")}
    planned = {"nanodft"}
    for room in (r for rooms_of in FLOORS.values() for r in rooms_of if "*" not in r):
        assert room in rooms | planned, f"there is no {room}"


def test_no_import_cycles():
    """Lazy imports count: a cycle that is hidden in a function is a cycle."""
    graph = {
        module: {name for _, name, _ in ours(module)} - {"md_plugin", "lammps_interface", module}
        for module in FILES
    }
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                visit(name, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("module", FILES)
def test_third_party_packages_stay_in_their_rooms(module):
    for line, name, inside in imports(module):
        package = name.split(".")[0]
        if package in sys.stdlib_module_names or package in PACKAGES:
            continue
        place = f"{FILES[module]}:{line} imports {package}"
        assert package in ROOMS, f"{place}, which has no room yet"
        assert module not in NO_PACKAGES or inside, f"{place} when it is imported itself"
        assert matches(module, ROOMS[package]), place
        own_file = module.endswith(OWN_FILES)
        assert package not in OPTIONAL or inside or own_file, f"{place}, not lazily"


@pytest.mark.parametrize("module", FILES)
def test_sizes(module):
    n_lines = len(FILES[module].read_text().splitlines())
    assert n_lines <= MAX_FILE, f"{FILES[module]} has {n_lines} lines"
    for function in functions(module):
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{FILES[module]}: {function.name} has {length} lines"
        compiled = any("jit" in ast.unparse(d) for d in function.decorator_list)  # kernels
        arguments = [a.arg for a in function.args.posonlyargs + function.args.args]
        count = len([a for a in arguments if a not in ("self", "cls", "ctx")])
        assert compiled or count <= MAX_ARGUMENTS, f"{FILES[module]}: {function.name} takes {count}"


@pytest.mark.parametrize("module", FILES)
def test_no_print_no_global_no_leftovers(module):
    for node in ast.walk(TREES[module]):
        place = f"{FILES[module]}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{place}: global"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint", "exec", "eval"), place
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{place}: import *"
        if isinstance(node, ast.ExceptHandler):
            silent = node.type is None and not any(isinstance(n, ast.Raise) for n in node.body)
            assert not silent, f"{place}: bare except"


@pytest.mark.parametrize("module", FILES)
def test_public_names_have_docstrings(module):
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{FILES[module]} does not say what it is"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{FILES[module]}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    if any(".setter" in ast.unparse(d) for d in method.decorator_list):
                        continue  # the property says it
                    name = f"{node.name}.{method.name}"
                    assert ast.get_docstring(method), f"{FILES[module]}:{method.lineno} {name}"


def test_public_names_are_really_there():
    import lammps_interface
    import md_plugin

    for package in (md_plugin, lammps_interface):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match=r"has no attribute 'nothing_like_this'"):
            _ = package.nothing_like_this


STATE = """
import json, locale, os, random, signal, sys, warnings, logging, threading
def state():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "random": hash(random.getstate()),
        "signals": [str(signal.getsignal(s)) for s in signals],
        "warnings": len(warnings.filters),
        "logging": [str(h) for h in logging.getLogger().handlers] + [logging.getLogger().level],
        "threads": threading.active_count(),
        "locale": locale.setlocale(locale.LC_ALL),
        "hooks": [str(sys.excepthook), str(sys.displayhook), len(sys.meta_path)],
    }
before, modules = state(), set(sys.modules)
import md_plugin, lammps_interface, lammps_interface.entry
after = state()
heavy = {name.split(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names)
print(json.dumps([before == after, sorted(heavy)]))
"""

TORCH_STATE = """
import json, torch, numpy, numba, ase
def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), numba.get_num_threads()],
        "seed": torch.initial_seed(),
        "random": torch.random.get_rng_state().sum().item(),
        "numpy": str(numpy.random.get_state()[1][:5]),
        "numpy errors": numpy.geterr(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "print": str(torch._tensor_str.PRINT_OPTS),
        "cuda": torch.cuda.is_initialized(),
    }
before = state()
import importlib, os
for name in json.loads(os.environ["MODULES"]):
    importlib.import_module(name)
after = state()
print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""


def child(code, modules=()):
    """Runs code in a process without what imports of this process left in the environment."""
    env = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    env |= {"MODULES": json.dumps(list(modules)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "importing must print nothing"
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_importing_the_packages_is_light_and_changes_nothing():
    unchanged, heavy = child(STATE)
    assert unchanged
    assert heavy == ["lammps_interface", "md_plugin"]


def test_importing_every_module_changes_no_global_state():
    modules = [name for name in FILES if not name.endswith(OWN_FILES)]
    assert child(TORCH_STATE, modules) == {}
