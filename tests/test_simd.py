"""The register tiles of the CPU sums: tails, offsets, ends of memory, other CPUs, the cache."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from md_plugin.kernels import numba_rows, simd, tiles

ROOT = Path(__file__).parent.parent
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100)
# As numba and LLVM name them; what is not asked for is switched off.
CPUS = {
    "this CPU": {},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2"},
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
}


def problem(n_nu, n_feat, dtype, place=np.array):
    """Arguments and outputs of the three kernels: 3 receivers, 4 senders, an empty row."""
    rng = np.random.default_rng(n_nu + 1000 * n_feat)
    counts = (6, 0, 11)
    row_ptr = np.cumsum((0, *counts)).astype(np.int32)
    sender = rng.integers(4, size=17).astype(np.int32)
    shapes = {"sense": (17, n_nu), "features": (4, n_feat), "env": (3, n_nu, n_feat)}
    given = {name: place(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()}
    out = {name: place(np.full(shape, np.nan, dtype)) for name, shape in shapes.items()}
    out["features"][:] = 0.0
    return given, out, place(row_ptr), place(sender)


def run(given, out, row_ptr, sender):
    """All rows, in two calls."""
    s, z, e = given["sense"], given["features"], given["env"]
    for start, stop in ((0, 1), (1, 3)):
        numba_rows.envsum_rows(s, z, row_ptr, sender, out["env"], start, stop)
        numba_rows.sensesum_rows(e, z, row_ptr, sender, out["sense"], start, stop)
        numba_rows.featsum_rows(e, s, row_ptr, sender, out["features"], start, stop)


def largest_error(given, out, row_ptr, sender):
    """Of the three, relative to the largest value, in units of the rounding error."""
    s, z, e = (given[name].astype(np.float64) for name in ("sense", "features", "env"))
    receiver = np.repeat(np.arange(3), np.diff(row_ptr))
    want = {name: np.zeros(out[name].shape) for name in out}
    for p, (i, j) in enumerate(zip(receiver, sender, strict=True)):
        want["env"][i] += np.outer(s[p], z[j])
        want["sense"][p] = e[i] @ z[j]
        want["features"][j] += s[p] @ e[i]
    eps = np.finfo(out["env"].dtype).eps
    return max(np.abs(out[k] - want[k]).max() / (np.abs(want[k]).max() or 1.0) for k in want) / eps


def at_offset(array):
    """Starts one element into a larger buffer of NaN."""
    kind = np.nan if array.dtype.kind == "f" else -1
    buffer = np.full(array.size + 65, kind, array.dtype)
    view = buffer[1 : array.size + 1].reshape(array.shape)
    view[...] = array
    return view


def before_a_wall(array):
    """Ends at the last byte of a page; the next one may be neither read nor written."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    n_byte = -(-max(array.nbytes, 1) // page) * page
    buffer = mmap.mmap(-1, n_byte + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    none = ctypes.CDLL(None, use_errno=True).mprotect
    assert none(ctypes.c_void_p(address + n_byte), ctypes.c_size_t(page), 0) == 0
    view = np.frombuffer(buffer, array.dtype, array.size, n_byte - array.nbytes)
    view = view.reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("place", (np.array, at_offset))
def test_every_width(dtype, place):
    """Any n_nu and n_feat: fewer than a vector, one more than a tile, tails of any length."""
    for n_feat in WIDTHS:
        for n_nu in (1, 3, 4, 5, 9, 16, 20, 33):
            arrays = problem(n_nu, n_feat, dtype, place)
            run(*arrays)
            # at most 187 products: rounding grows like the root of that, here by less than 4
            assert largest_error(*arrays) < 4, (n_nu, n_feat)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_nothing_beside_the_outputs_is_written(dtype):
    for n_nu, n_feat in ((7, 41), (3, 1), (20, 15)):
        given, out, *pairs = problem(n_nu, n_feat, dtype, at_offset)
        run(given, out, *pairs)
        for name, array in (*out.items(), *given.items()):
            buffer = array.base if array.base.ndim == 1 else array.base.base
            assert np.isnan(buffer[0]) and np.isnan(buffer[array.size + 1 :]).all(), name
            assert not np.isnan(array).any(), name


def test_zero_sensitivities_are_left_out_exactly():
    """A run of zeros at the end, per row and per pair; also where the features are not finite."""
    for n_nu, used in ((20, 12), (20, 15), (41, 1), (5, 0)):
        given, out, row_ptr, sender = problem(n_nu, 70, np.float64)
        given["sense"][:, used:] = 0.0
        given["sense"][3:9, used // 2 :] = 0.0
        given["env"][:, used:] = np.inf
        run(given, out, row_ptr, sender)
        assert not out["env"][:, used:].any() and np.isfinite(out["features"]).all()
        given["env"][:, used:] = 0.0
        run(given, out | {"features": (again := np.zeros_like(out["features"]))}, row_ptr, sender)
        assert largest_error(given, out | {"features": again}, row_ptr, sender) < 4


def test_denormals_are_flushed_inside_and_kept_outside():
    tiny = np.array([[1e-40]], np.float32)
    env = np.full((1, 1, 1), np.nan, np.float32)
    row_ptr, sender = np.array([0, 1], np.int32), np.zeros(1, np.int32)
    numba_rows.envsum_rows(tiny, np.ones((1, 1), np.float32), row_ptr, sender, env, 0, 1)
    assert 0.0 <= env[0, 0, 0] <= tiny[0, 0]
    assert tiny[0, 0] * np.float32(0.5) > 0.0  # numpy, in this thread, after the kernel


@pytest.mark.parametrize("cpu", CPUS)
def test_on_other_cpus_up_to_the_last_byte(cpu, tmp_path):
    """Right, and never beyond the end of an array, with 4, 8 and 16 lanes."""
    if CPUS[cpu] and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{cpu} is of x86")
    if cpu == "AVX2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    code = (
        "import numpy as np, test_simd as t\n"
        "for dtype in (np.float32, np.float64):\n"
        "    for n_nu, n_feat in ((20, 64), (7, 41), (1, 1), (3, 5), (33, 70), (9, 17)):\n"
        "        arrays = t.problem(n_nu, n_feat, dtype, t.before_a_wall)\n"
        "        t.run(*arrays)\n"
        "        assert t.largest_error(*arrays) < 4, (n_nu, n_feat)\n"
        "print('fine')\n"
    )
    assert python(code, tmp_path, CPUS[cpu]) == "fine\n"


def python(code, cache, environment=None, root=ROOT):
    """Run code in a process with its own cache; its output."""
    path = os.pathsep.join((str(root), str(ROOT / "tests")))
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": path} | (environment or {})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr or done.returncode
    return done.stdout


COUNT = (
    "import numpy as np, test_simd as t\n"
    "arrays = t.problem(7, 41, np.float32)\n"
    "t.run(*arrays)\n"
    "assert t.largest_error(*arrays) < 4\n"
    "print(sum(t.numba_rows.envsum_rows.stats.cache_misses.values()))\n"
)


def test_compiled_code_is_kept_until_the_tiles_change(tmp_path):
    """numba looks at the file of a kernel only; the tiles are in others."""
    import shutil

    shutil.copytree(ROOT / "md_plugin", tmp_path / "md_plugin")
    found = [python(COUNT, tmp_path / "cache", root=tmp_path) for _ in range(2)]
    for name in ("tiles.py", "simd.py"):
        with open(tmp_path / "md_plugin" / "kernels" / name, "a") as file:
            file.write("# changed\n")
        found.append(python(COUNT, tmp_path / "cache", root=tmp_path))
    assert found == ["1\n", "0\n", "1\n", "1\n"]


def test_several_processes_may_start_at_once(tmp_path):
    """As the ranks of an MPI run do, where nothing is compiled yet."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    ranks = [subprocess.Popen([sys.executable, "-c", COUNT], env=env) for _ in range(3)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0, 0]
    assert python(COUNT, tmp_path) == "0\n"


def test_missing_internals_are_named(monkeypatch):
    monkeypatch.setitem(simd.INTERNALS, simd.cgutils, ("unpack_tuple", "not_there"))
    message = r"numba .* with llvmlite .* has no .*cgutils.not_there, which the CPU sums need"
    with pytest.raises(ImportError, match=message):
        simd.check_internals()


def test_tiles_are_chosen_for_the_cpu():
    """Sums, one row of features and one factor fit into the vector registers."""

    class Context:
        def __init__(self, *key):
            self.key = key

        def codegen(self):
            return self

        def magic_tuple(self):
            return self.key

    lanes = {
        ("x86_64-linux", "", "+sse2,-avx,-avx512f"): (4, 16),
        ("x86_64-linux", "", "+avx,+avx2,-avx512f"): (8, 16),
        ("x86_64-linux", "", "+avx,+avx2,+avx512f"): (16, 32),
        ("aarch64-linux-gnu", "", "+neon"): (4, 32),
        ("arm64-apple-darwin", "", ""): (4, 32),
    }
    for key, (n_lane, n_register) in lanes.items():
        single, double = (
            simd.registers(Context(*key), getattr(simd.types, name))
            for name in ("float32", "float64")
        )
        assert single.lanes == n_lane == 2 * double.lanes
        for found in (single, double):
            assert (tiles.ENV_SENSES + 1) * found.wide + 1 <= n_register
            assert tiles.FEAT_PAIRS * found.wide + found.wide + 1 <= n_register
