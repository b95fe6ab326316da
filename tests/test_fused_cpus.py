"""The fused kernels: ends of memory, other CPUs, the cache."""

import ctypes
import inspect
import mmap
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from md_plugin.kernels import fused_cpu, fused_row, fused_rows, fused_tensor_rows

ROOT = Path(__file__).parent.parent
# As numba and LLVM name them; what is not asked for is switched off.
CPUS = {
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2"},
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
}


def before_a_wall(array):
    """Ends at the last byte of a page; the next one may be neither read nor written."""
    page = mmap.PAGESIZE
    n_byte = -(-max(array.nbytes, 1) // page) * page
    buffer = mmap.mmap(-1, n_byte + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + n_byte), page, 0) == 0
    offset = n_byte - array.nbytes
    view = np.frombuffer(buffer, array.dtype, array.size, offset).reshape(array.shape)
    view[...] = array
    return view


def layers(n_feat, place=np.array):
    """Everything that a scalar, a one-hot and a quadrupole layer write, in float32."""
    rng = np.random.default_rng(n_feat)
    x = rng.uniform(0, 5, (7, 3))
    rows = [1, 2, 3, 4, 5], [], [5], [0, 1, 2, 4, 5, 6]
    sender = np.concatenate(rows).astype(np.int32)
    where = fused_cpu.geometry(
        x,
        np.cumsum([0, *(len(row) for row in rows)]),
        sender,
        np.arange(len(sender)) % 2,
        np.array([[0.0, 0, 0], [0.0, 0.1, 0]]),
        np.arange(7) % n_feat,
    )
    where = fused_cpu.Geometry(*(place(array) for array in where))
    table = fused_cpu.RadialTable.build(np.linspace(1.2, 5.0, 9), np.full(9, 20.0), 5.5)
    found = []

    def normal(*shape):
        return place(rng.normal(size=shape).astype(np.float32))

    def gradients(n):
        g = fused_cpu.Gradients(7, n)
        g.forces, g.messages, g.virials = (place(a) for a in (g.forces, g.messages, g.virials))
        return g

    for z in (normal(7, n_feat), None):
        env, g = normal(4, 9, n_feat), gradients(n_feat)
        fused_cpu.forward(where, table, z, env)
        fused_cpu.backward(where, table, z, normal(4, 9, n_feat), g)
        found += [env, *g.total()]
    q, m, g = normal(7, 9, n_feat), normal(4, 9, n_feat), gradients(9 * n_feat)
    fused_cpu.tensor_forward(where, table, q, m)
    fused_cpu.tensor_backward(where, table, q, normal(4, 9, n_feat), g)
    return [*found, m, *g.total()]


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with mprotect")
@pytest.mark.parametrize("n_feat", [1, 3, 16, 17, 65])
def test_nothing_is_touched_behind_an_array(n_feat):
    plain, walled = layers(n_feat), layers(n_feat, before_a_wall)
    assert all((a == b).all() for a, b in zip(plain, walled, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names CPUs of x86")
@pytest.mark.parametrize("cpu", CPUS)
def test_other_cpus_find_the_same(cpu, tmp_path):
    """Vectors of 256 and of 128 bits, without and with AVX's fused multiply-add."""
    code = "import sys, numpy; from test_fused_cpus import layers; "
    code += "numpy.savez(sys.argv[1], *layers(37))"
    file = tmp_path / "found.npz"
    env = {**os.environ, **CPUS[cpu], "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = np.load(file)
    for mine, name in zip(layers(37), theirs.files, strict=True):
        scale = np.abs(mine).max() or 1.0
        assert np.abs(mine - theirs[name]).max() < 1e-5 * scale


def test_every_cached_kernel_knows_the_files_it_is_made_of():
    functions = [
        function
        for module in (fused_rows, fused_tensor_rows)
        for function in vars(module).values()
        if isinstance(function, Dispatcher)
    ]
    assert len(functions) == 9
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in fused_row.FILES))
    for function in functions:
        closure = inspect.getclosurevars(function.py_func)
        assert closure.nonlocals == {"checksum": checksum}, function.py_func.__name__
    writers = {path.name for path in fused_row.FILES}
    folder = Path(fused_row.__file__).parent
    theirs = {path.name for path in folder.glob("fused_*.py")}
    assert writers == theirs | {"simd.py", "vector_ir.py", "vector_math.py"}


MODULE = """
from pathlib import Path
import numpy as np
from numba.core.dispatcher import Dispatcher
from md_plugin.kernels.compiled import compiled

slow = []
whole = Dispatcher._compile_for_args
def counted(self, *args, **kws):
    slow.append(1)
    return whole(self, *args, **kws)
Dispatcher._compile_for_args = counted

@compiled([Path(__file__).with_name("part.txt")])
def double(x):
    return 2.0 * x.sum()

for _ in range(3):
    assert double(np.ones(3)) == 6.0
print(len(slow), sum(double.stats.cache_hits.values()))
"""


def test_compiled_code_is_kept_until_one_of_its_files_changes(tmp_path):
    """Calls after the first take numba's quick way, also into code that was read from disk."""
    (tmp_path / "module.py").write_text(MODULE)
    found = []
    for text in ("one", "one", "two", "one"):
        (tmp_path / "part.txt").write_text(text)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, str(tmp_path / "module.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["1", "0"], ["1", "1"], ["1", "0"], ["1", "1"]]
