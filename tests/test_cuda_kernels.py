"""The kernels in CUDA C and in numba's Python beyond the matrix: launches, offsets, GPUs, streams.

Without a GPU, CUDA C is emulated (`cuda_emulation`) and compiled for GPUs by NVRTC where it is
installed; numba's kernels run in numba's simulator, in a process of its own, because a variable of
the environment asks for it when numba is imported.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import cuda_emulation
import pytest
import torch
from kernel_cases import (
    ARGUMENTS,
    CASES,
    DTYPES,
    EMULATED,
    OPS,
    Case,
    absence,
    assert_sum,
    expected,
    poisoned_memory,
    run_sum,
)
from model_helpers import STRUCTURES, make_potential
from physics_suite import close
from test_fusion import geometry

from md_plugin.kernels import cuda_launch, get_backend, list_backends, registry
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.registry import self_check
from md_plugin.pairs import Pairs

FOLDER = Path(__file__).parent
SOURCE = "\n".join(
    Path(cuda_launch.__file__).with_name(name).read_text()
    for name in ("cuda_sums.cu", "cuda_radial.cu")
)
IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
emulation = pytest.mark.skipif(bool(absence(EMULATED)), reason=absence(EMULATED) or "there")


def kernel(name, dtype=torch.float32):
    return cuda_emulation.emulated()._kernel(name, dtype)


@pytest.fixture
def launches():
    """(grid, block, bytes) of each kernel since the test began."""
    names = ("envsum", "sensesum", "messages", "gather", "stack", "slope")
    for name in names:
        kernel(name).launches.clear()
    return lambda: {name: kernel(name).launches for name in names if kernel(name).launches}


@emulation
def test_what_is_launched(launches):
    """A row of pairs per block, tiles of equal width; 17 of pairs in a row on average."""
    case, kernels = CASES["large"], cuda_emulation.emulated_backend().kernels
    for op in OPS:
        run_sum(op, kernels, case, case.arrays(torch.float32))
    assert launches() == {
        "envsum": [((20, 1, 1), (16, 5), 32 * (64 + 20) * 4)],
        "sensesum": [((20, 1, 1), (5, 7), (20 + 28) * 36 * 4)],
        "messages": [((20, 1, 1), (16, 7), (32 * 64 + 28 * 36) * 4)],
        "gather": [((4, 2, 1), (32, 8), 0)],
    }


@pytest.mark.parametrize("n", (1, 4, 5, 20, 64, 65, 80, 180, 1000, 4096))
def test_tiles_hold_everything_and_waste_little(n):
    blocks, threads = cuda_launch.tile(n)
    assert threads <= 16 and n <= 4 * blocks * threads < n + 4 * blocks


@emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("most", "n_part"), [(8, 8), (3, 3), (100, 58)])
def test_featsum_in_parts(launches, monkeypatch, dtype, most, n_part):
    """The messages of all pairs at once, or of some: within the tolerance of the matrix."""
    case, kernels = CASES["large"], cuda_emulation.emulated_backend().kernels
    arrays = case.arrays(dtype)
    monkeypatch.setattr(cuda_launch, "WORKSPACE", 7 * 64 * dtype.itemsize)
    monkeypatch.setattr(cuda_launch, "MOST_PARTS", most)
    kernel("messages", dtype).launches.clear()
    with poisoned_memory():
        got = run_sum("featsum", kernels, case, arrays)
    assert len(kernel("messages", dtype).launches) == n_part
    assert_sum(got, *expected("featsum", case, arrays["env"], arrays["sense"]), dtype)


@emulation
def test_offsets_beyond_32_bits():
    """Arrays of more than 2^31 numbers, of which the kernels touch a few (memory is not filled)."""
    kernels, n_feat = cuda_emulation.emulated_backend().kernels, 64
    n_send = 2**31 // n_feat + 8
    last = Pairs.from_edges(torch.tensor([0]), torch.tensor([n_send - 1]), 1, n_send)[0]
    features = torch.empty(n_send, n_feat)
    features[-1] = torch.arange(n_feat)
    sense, env = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, n_feat)
    assert torch.equal(kernels.envsum(sense, features, last)[0], sense.T * features[-1])
    assert kernels.sensesum(env, features, last).tolist() == [[2016.0, 2016.0]]
    n_feat, n_recv = 2**16, 2**15 + 1
    row_ptr = torch.zeros(n_recv + 1, dtype=torch.int32)
    row_ptr[-1] = 1
    pairs = Pairs(row_ptr, torch.zeros(1, dtype=torch.int32), n_recv)
    env, features = torch.empty(n_recv, 1, n_feat), torch.empty(n_recv, n_feat)
    env[-1], features[0] = 2.0, 0.5
    assert kernels.sensesum(env, features, pairs).tolist() == [[float(n_feat)]]


def spoiled(monkeypatch, before, after):
    """The emulated kernels with a change in their source."""
    module = cuda_emulation.emulated()
    assert before in SOURCE
    broken = cuda_emulation.RawModule(
        code=SOURCE.replace(before, after, 1), options=module.OPTIONS[torch.float32]
    )
    monkeypatch.setattr(module, "_kernel", lambda name, dtype: broken.get_function(name))
    return cuda_emulation.emulated_backend().kernels


FAULTS = {
    "a barrier is missing": ("        __syncthreads();\n        for", "        for"),
    "the wrong row is written": ("(i * n_nu + nu + m) * n_feat", "(i * n_nu + nu) * n_feat"),
    "not all come to the barrier": (
        "    for (int p = row_ptr[i]; p",
        "    if (threadIdx.x) return;\n    for (int p = row_ptr[i]; p",
    ),
    "more than its shared memory": ("s = shared + TERMS * width", "s = shared + 8 + TERMS * width"),
}


@emulation
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_source_is_found(monkeypatch, fault):
    """The emulation is a test only where it notices what a GPU would."""
    kernels, case = spoiled(monkeypatch, *FAULTS[fault]), CASES["beyond every block"]
    arrays = case.arrays(torch.float32)
    want, tolerance = expected("envsum", case, arrays["sense"], arrays["features"])
    with pytest.raises(AssertionError), poisoned_memory():
        assert_sum(run_sum("envsum", kernels, case, arrays), want, tolerance, torch.float32)


def cupy_gpu(monkeypatch, **cuda):
    """The module itself, with a cupy that only has streams and devices."""
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(**cuda)))
    path = Path(cuda_launch.__file__).with_name("cupy_gpu.py")
    spec = spec_from_file_location("cupy_gpu_of_a_test", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Entered:
    """A context that notes what it was made of, while it is entered."""

    inside = []

    def __init__(self, *what):
        self.what = what

    def __enter__(self):
        self.inside.append(self.what)

    def __exit__(self, *error):
        self.inside.remove(self.what)


@pytest.mark.parametrize("protocol", (True, False))
def test_cupy_launches_on_the_stream_of_torch(monkeypatch, protocol):
    class Stream(Entered):
        pass

    if protocol:
        Stream.from_external = classmethod(lambda cls, stream: cls("the stream itself", stream))
    module = cupy_gpu(monkeypatch, Device=Entered, Stream=Stream, ExternalStream=Entered)
    stream = SimpleNamespace(cuda_stream=1234, __cuda_stream__=lambda: (0, 1234))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    tensor = SimpleNamespace(device=torch.device("cuda:1"))
    wanted = ("the stream itself", stream) if protocol else (1234,)
    with module.on_stream(tensor):
        assert Entered.inside == [(1,), wanted]
    assert Entered.inside == []


def test_cupy_refuses_tensors_that_are_not_on_a_gpu(monkeypatch):
    module = cupy_gpu(monkeypatch)
    pairs = Pairs.from_edges(torch.tensor([0]), torch.tensor([0]), 1, 1)[0]
    with pytest.raises(
        ValueError, match="'cupy' computes on CUDA devices, but the tensors are on "
    ):
        module.envsum(torch.ones(1, 2), torch.ones(1, 3), pairs)


def numba_cuda(monkeypatch):
    """The module itself, told that there is CUDA."""
    monkeypatch.setattr("numba.cuda.is_available", lambda: True)
    path = Path(cuda_launch.__file__).with_name("numba_cuda.py")
    spec = spec_from_file_location("numba_cuda_of_a_test", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_numba
def test_numba_launches_on_the_stream_of_torch(monkeypatch):
    module, launched = numba_cuda(monkeypatch), []

    class Kernel:
        def __getitem__(self, configuration):
            return lambda *arguments: launched.append((*configuration, arguments))

    device, stream = torch.device("cuda:1"), SimpleNamespace(cuda_stream=1234)
    like = SimpleNamespace(device=device, element_size=lambda: 8)
    fake = SimpleNamespace(gpus={1: Entered(1)}, external_stream=lambda address: [address])
    monkeypatch.setattr(module, "cuda", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", {device: stream}.__getitem__)
    for kernels, name in ((module.numba_cuda_sums, "fold"), (module.numba_cuda_radial, "slope")):
        monkeypatch.setattr(kernels, name, Kernel())
        module._launch(name, (5, 1, 1), (32, 8), 3, (like, 7, 2.5))
    assert launched == 2 * [((5, 1, 1), (32, 8), [1234], 24, (like, 7, 2.5))]


@needs_numba
def test_numba_refuses_tensors_that_are_not_on_a_gpu(monkeypatch):
    module = numba_cuda(monkeypatch)
    monkeypatch.setattr(module, "DEVICES", ("cuda",))  # also in the simulator
    with pytest.raises(ValueError, match="'numba_cuda' computes on CUDA devices, but the tensors"):
        module.stack(torch.ones(1, 2), torch.ones(1, 3))


@needs_numba
@pytest.mark.skipif(IS_SIMULATED or torch.cuda.is_available(), reason="numba finds CUDA")
def test_numba_without_cuda_says_what_to_install(monkeypatch):
    """Torch has a driver's CUDA, numba lacks its own parts."""
    registry._absence.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = list_backends()["numba_cuda"]
    registry._absence.cache_clear()
    assert "importing it failed: RuntimeError: numba finds no CUDA" in reason
    assert "pip install 'numba-cuda[cu12]' or 'numba-cuda[cu13]'" in reason


@emulation
def test_networks_take_the_closed_sums(monkeypatch):
    """There are no fused layers for cupy: energies, forces and virial come all the same."""
    cuda_emulation.register(monkeypatch)
    structure = STRUCTURES["crystal"]()
    potential, plain = (make_potential(backend=name, order=1) for name in ("cupy", "torch"))
    assert "the backend is 'cupy', and only" in potential.why_not_fused()
    assert "backend='cupy', closed sums" in repr(potential)
    assert "fused layers" in repr(make_potential(backend="numba"))
    species = torch.from_numpy(structure.species)
    found, want = (
        p.evaluate_geometry(species, geometry(structure, p.rcut)) for p in (potential, plain)
    )
    assert found.sums is None
    close(found.atom_energy, want.atom_energy, atol=1e-11, rtol=1e-15)
    close(found.forces, want.forces, atol=1e-11)
    close(found.virial, want.virial, atol=1e-10)


def nvrtc():
    """The library, from a package or from a toolkit; None where there is none."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"]
    package = find_spec("nvidia")
    for root in package.submodule_search_locations if package else ():
        places += [Path(root) / name / "lib" for name in ("cu13", "cuda_nvrtc")]
    found = [path for place in places for path in sorted(place.glob("libnvrtc.so.[0-9]*"))]
    return ctypes.CDLL(str(found[0])) if found else None


def cubin(real, capability):
    """Machine code of the source: by NVRTC, as cupy has it made, or else by nvcc."""
    options = ["--std=c++17", f"-DREAL={real}", f"--gpu-architecture=sm_{capability}"]
    library = nvrtc()
    if library is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            command = ["nvcc", *options, "-cubin", "-x", "cu", "-", "-o", file.name]
            subprocess.run(command, input=SOURCE, text=True, check=True)
            return file.read()
    program, size, log = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.create_string_buffer(20_000)
    text = SOURCE.encode()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), text, b"sums.cu", 0, None, None)
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    fault = library.nvrtcCompileProgram(program, len(options), flags)
    library.nvrtcGetProgramLog(program, log)
    assert not fault, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    return code.raw


@pytest.mark.skipif(
    nvrtc() is None and shutil.which("nvcc") is None,
    reason="neither NVRTC (nvidia-cuda-nvrtc) nor nvcc is installed",
)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton, whose tools read code, is absent")
@pytest.mark.parametrize(("real", "capability"), [("float", 80), ("double", 90)])
def test_machine_code(real, capability):
    """Everything stays in registers; loads are wide; no atomics.

    But for one number: NVRTC 13.0 stores and loads 4 bytes of curvature in float64; nvcc does not.
    """
    from triton_assembly import findings

    found = findings({"cubin": cubin(real, capability)})
    by_nvrtc = nvrtc() is not None
    assert found["spill"] <= 2 * (by_nvrtc and real == "double") and found["STACK"] == 0
    assert found["wide_load"] >= 6  # of each staged array
    assert found["add"] == 0


SIMULATED = (
    "tests/test_kernels.py::test_matrix",
    "tests/test_cuda_kernels.py",
)
CHOSEN = "numba_cuda and cpu and not large and not beyond or test_simulated"


@needs_numba
@pytest.mark.skipif(IS_SIMULATED, reason="this is the simulation")
def test_numba_kernels_in_the_simulator():
    """The matrix, but for its largest shapes: to simulate a thread takes 0.1 ms."""
    command = [sys.executable, "-m", "pytest", *SIMULATED, "-k", CHOSEN, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=FOLDER.parent,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    n_matrix = len(OPS) * len(DTYPES) * (len(CASES) - 2)
    assert f"{n_matrix + 5} passed" in done.stdout, done.stdout


simulation = pytest.mark.skipif(not IS_SIMULATED, reason="in the simulator only")


@simulation
@pytest.mark.parametrize("op", OPS)
def test_simulated_tiles(op):
    """More than one tile of pairs, of sensitivities and of features."""
    case = Case([0] * 33, [0, 1, 1] * 11, 1, 2, 65, 66)
    arrays = case.arrays(torch.float32)
    want = expected(op, case, *(arrays[name] for name in ARGUMENTS[op]))
    assert_sum(run_sum(op, get_backend("numba_cuda").kernels, case, arrays), *want, torch.float32)


@simulation
@pytest.mark.parametrize("family", ("products", "sensitivities"))
def test_simulated_families(family):
    """Against the reference in float64, and their gradients."""
    backend = get_backend("numba_cuda")
    self_check(backend, "cpu", family)
    generator = torch.Generator().manual_seed(0)
    t, s = (torch.rand(3, n, generator=generator, dtype=torch.float64) for n in (2, 4))
    function, inputs = backend.stack, (t, s)
    if family == "sensitivities":
        function = partial(backend.sensitivity, cutoff=Cutoff(6.0, 5.5))
        inputs = (1 + t[:, 0], 1 + s[0], 1 + s[1])
    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], fast_mode=True)
