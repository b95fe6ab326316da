"""A `cupy` made of g++: CUDA C is compiled as C++ and runs on CPU tensors, one fibre per thread.

Only what `md_plugin.kernels.cupy_gpu` calls is here. Kernels get their arguments as a driver does,
as addresses of values, and are launched with the grid, block and bytes of shared memory that the
launcher asks for; each value's type is compared with the kernel's signature, and sizes with what
every GPU since compute capability 7.0 has.
"""

import contextlib
import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

HEADER = Path(__file__).with_name("cuda_emulation.h")
SIGNATURE = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\)', re.DOTALL
)
FAULTS = ("", "some threads leave while others wait", "a block writes behind its shared memory")
MOST_SHARED = 48 * 1024  # without a kernel's attribute being set
ABSENT = "" if shutil.which("g++") else "no g++, which compiles CUDA C for the CPU"


@cache
def compiled(code, options):
    """The library of a source, kept in the folder for temporary files."""
    text = HEADER.read_text() + code + "\nconstexpr size_t ROOM = 1 << 17;\n"
    text += "alignas(16) real shared[ROOM / sizeof(real)];\n"
    for _, name, parameters in SIGNATURE.findall(code):
        types = [" ".join(p.split()[:-1]) + "*" * p.count("*") for p in parameters.split(",")]
        values = ", ".join(f"*({t} *)a[{k}]" for k, t in enumerate(types))
        text += (
            f'extern "C" int launch_{name}(void **a, const int *grid, const int *block, int n)\n'
            f"{{\n    emulation::kernel = [=] {{ {name}({values}); }};\n"
            "    return emulation::run(grid, block, (char *)shared, ROOM, n);\n}\n"
        )
    flags = [option for option in options if option.startswith(("-D", "-std", "--std"))]
    command = ["g++", *flags, "-O1", "-w", "-shared", "-fPIC", "-x", "c++", "-"]
    key = hashlib.sha256(repr((text, command)).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"cuda_emulation_{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "new.so"
            subprocess.run([*command, "-o", str(new)], input=text, text=True, check=True)
            shutil.move(new, path)
    return ctypes.CDLL(str(path))


class Kernel:
    """A kernel as `RawModule.get_function` gives it."""

    def __init__(self, library, name, most_threads, parameters):
        self.call, self.name, self.most_threads = library[f"launch_{name}"], name, most_threads
        self.kinds = ["pointer" if "*" in p else p.split()[0] for p in parameters.split(",")]
        self.launches = []

    def __call__(self, grid, block, args, *, shared_mem=0):
        allowed = {"pointer": np.uint64, "int": np.int32, "double": np.float64}
        assert [type(x) for x in args] == [allowed[kind] for kind in self.kinds], self.name
        assert len(grid) == 3 and min(grid) >= 1 and max(grid[1:]) <= 65535
        assert grid[0] < 2**31 and len(block) == 2 and min(block) >= 1
        assert block[0] * block[1] <= self.most_threads and shared_mem <= MOST_SHARED
        self.launches.append((grid, block, shared_mem))
        boxes = [np.array(x) for x in args]
        addresses = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        sizes = ((ctypes.c_int * len(n))(*n) for n in (grid, block))
        fault = self.call(addresses, *sizes, shared_mem)
        assert not fault, f"{self.name}: {FAULTS[fault]}"


class RawModule:
    """Source and options, as cupy compiles them."""

    def __init__(self, *, code, options=()):
        self.library = compiled(code, options)
        self.kernels = {
            name: Kernel(self.library, name, int(most), parameters)
            for most, name, parameters in SIGNATURE.findall(code)
        }

    def get_function(self, name):
        return self.kernels[name]


def fake_cupy():
    """A module named cupy."""
    module = ModuleType("cupy")
    module.RawModule = RawModule
    return module


@cache
def emulated():
    """`md_plugin.kernels.cupy_gpu` with CUDA C emulated on the CPU, beside the real module."""
    import importlib.util

    from md_plugin.kernels import cuda_launch

    path = Path(cuda_launch.__file__).with_name("cupy_gpu.py")
    spec = importlib.util.spec_from_file_location("emulated_cupy_gpu", path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = fake_cupy()
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before
    module.DEVICES = ("cpu",)
    module.on_stream = lambda tensor: contextlib.nullcontext()
    return module


@cache
def emulated_backend():
    """The backend 'cupy' on CPU tensors."""
    from md_plugin.kernels.closure import SumKernels
    from md_plugin.kernels.registry import Backend

    names = SumKernels.__dataclass_fields__
    return Backend("cupy", ("cpu",), SumKernels(**{n: getattr(emulated(), n) for n in names}))


def register(monkeypatch):
    """Let the registry find it."""
    from md_plugin.kernels import registry

    backend, load, absence = emulated_backend(), registry._load, registry._absence
    monkeypatch.setattr(registry, "_load", lambda n: backend if n == "cupy" else load(n))
    monkeypatch.setattr(registry, "_absence", lambda n: "" if n == "cupy" else absence(n))
