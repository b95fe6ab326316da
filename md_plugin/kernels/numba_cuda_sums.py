"""The three sums and the products in Python for numba's CUDA: the kernels of `cuda_sums.cu`.

Blocks, threads and tiles are those of the kernels in CUDA C, which say why; arrays have their
shapes, and shared memory is flat. What is launched: `cuda_launch`. Equations: `reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from numba import cuda

from md_plugin.kernels.cuda_launch import TERMS

PADDING = 16  # bytes, which keep rows of a tile in different banks


@cuda.jit(device=True)
def least(a, b):
    """The smaller of two integers; numba's own min looks for containers first."""
    return a if a < b else b


@cuda.jit(device=True)
def stage(to, pitch, rows, first, n_row, col, n_col):
    """to[k][c] = rows[first + k][col + c], k < n_row, c < n_col; zero beyond the last column."""
    zero = rows.dtype.type(0.0)
    for k in range(cuda.threadIdx.y, n_row, cuda.blockDim.y):
        for c in range(cuda.threadIdx.x, n_col, cuda.blockDim.x):
            there = col + c < rows.shape[1]
            to[k * pitch + c] = rows[first + k, col + c] if there else zero


@cuda.jit(device=True)
def stage_gathered(to, pitch, rows, index, first, n_row, col, n_col):
    """The same of rows[index[first + k]]."""
    zero = rows.dtype.type(0.0)
    for k in range(cuda.threadIdx.y, n_row, cuda.blockDim.y):
        row = index[first + k]
        for c in range(cuda.threadIdx.x, n_col, cuda.blockDim.x):
            there = col + c < rows.shape[1]
            to[k * pitch + c] = rows[row, col + c] if there else zero


@cuda.jit(device=True)
def clear(total):
    """Zeros in 4 x 4 sums of a thread."""
    for m in range(4):
        for k in range(4):
            total[m, k] = total.dtype.type(0.0)


@cuda.jit
def envsum(sense, features, row_ptr, sender, env, n_nu, n_feat):
    """Write env."""
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    width, height = 4 * cuda.blockDim.x, 4 * cuda.blockDim.y
    i, a0, nu0 = cuda.blockIdx.x, cuda.blockIdx.y * width, cuda.blockIdx.z * height
    z = cuda.shared.array(0, sense.dtype)
    s = z[TERMS * width :]
    total = cuda.local.array((4, 4), sense.dtype)
    clear(total)
    end = row_ptr[i + 1]
    for p in range(row_ptr[i], end, TERMS):
        n = least(TERMS, end - p)
        cuda.syncthreads()
        stage_gathered(z, width, features, sender, p, n, a0, width)
        stage(s, height, sense, p, n, nu0, height)
        cuda.syncthreads()
        for k in range(n):
            for m in range(4):
                left = s[k * height + 4 * y + m]
                for c in range(4):
                    total[m, c] += left * z[k * width + 4 * x + c]
    for m in range(4):
        for c in range(4):
            nu, a = nu0 + 4 * y + m, a0 + 4 * x + c
            if nu < n_nu and a < n_feat:
                env[i, nu, a] = total[m, c]


@cuda.jit
def sensesum(env, features, row_ptr, sender, sense, n_nu, n_feat):
    """Write sense."""
    x, y, n_x, n_y = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
    i, nu0 = cuda.blockIdx.x, cuda.blockIdx.y * 4 * n_x
    pitch = TERMS + PADDING // sense.itemsize
    e = cuda.shared.array(0, sense.dtype)
    z = e[4 * n_x * pitch :]
    total = cuda.local.array((4, 4), sense.dtype)
    end, live = row_ptr[i + 1], least(4 * n_x, n_nu - nu0)
    for p in range(row_ptr[i], end, 4 * n_y):
        n = least(4 * n_y, end - p)
        clear(total)
        for a in range(0, n_feat, TERMS):
            cuda.syncthreads()
            stage(e, pitch, env[i], nu0, live, a, TERMS)
            stage_gathered(z, pitch, features, sender, p, n, a, TERMS)
            cuda.syncthreads()
            for k in range(least(TERMS, n_feat - a)):
                for m in range(4):
                    left = z[(y + m * n_y) * pitch + k]
                    for c in range(4):
                        total[m, c] += left * e[(x + c * n_x) * pitch + k]
        for m in range(4):
            for c in range(4):
                k, nu = y + m * n_y, x + c * n_x
                if k < n and nu < live:
                    sense[p + k, nu0 + nu] = total[m, c]


@cuda.jit
def messages(env, sense, row_ptr, message, n_nu, n_feat, first, last):
    """Write messages of the pairs first .. last - 1."""
    x, y, n_y = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.y
    width, pitch = 4 * cuda.blockDim.x, TERMS + PADDING // sense.itemsize
    i, a0 = cuda.blockIdx.x, cuda.blockIdx.y * width
    e = cuda.shared.array(0, sense.dtype)
    s = e[TERMS * width :]
    total = cuda.local.array((4, 4), sense.dtype)
    end = least(row_ptr[i + 1], last)
    for p in range(-least(-row_ptr[i], -first), end, 4 * n_y):
        n = least(4 * n_y, end - p)
        clear(total)
        for nu in range(0, n_nu, TERMS):
            n_term = least(TERMS, n_nu - nu)
            cuda.syncthreads()
            stage(e, width, env[i], nu, n_term, a0, width)
            stage(s, pitch, sense, p, n, nu, TERMS)
            cuda.syncthreads()
            for k in range(n_term):
                for m in range(4):
                    left = s[(y + m * n_y) * pitch + k]
                    for c in range(4):
                        total[m, c] += left * e[k * width + 4 * x + c]
        for m in range(4):
            for c in range(4):
                k, a = y + m * n_y, a0 + 4 * x + c
                if k < n and a < n_feat:
                    message[p - first + k, a] = total[m, c]


@cuda.jit
def gather(message, col_ptr, perm, features, n_send, n_feat, first, last):
    """Write features, or add to them where there were pairs before `first`."""
    j = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    a = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if j < n_send and a < n_feat:
        total = features[j, a] if first > 0 else features.dtype.type(0.0)
        for k in range(col_ptr[j], col_ptr[j + 1]):
            p = perm[k]
            if first <= p < last:
                total += message[p - first, a]
        features[j, a] = total


@cuda.jit
def stack(t, s, stacked, n_pair, n_comp, n_nu):
    """Write stacked."""
    p = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if p < n_pair:
        for nu in range(cuda.threadIdx.x, n_nu, cuda.blockDim.x):
            for c in range(n_comp):
                stacked[p, c * n_nu + nu] = t[p, c] * s[p, nu]


@cuda.jit
def stack_along(t, s, dt, ds, stacked, n_pair, n_comp, n_nu):
    """Write stacked."""
    p = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if p < n_pair:
        for nu in range(cuda.threadIdx.x, n_nu, cuda.blockDim.x):
            for c in range(n_comp):
                stacked[p, c * n_nu + nu] = t[p, c] * ds[p, nu] + dt[p, c] * s[p, nu]


@cuda.jit
def fold(stacked, t, s, to_t, to_s, n_pair, n_comp, n_nu):
    """Write to_t and to_s."""
    p = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if p < n_pair:
        for nu in range(cuda.threadIdx.x, n_nu, cuda.blockDim.x):
            total = s.dtype.type(0.0)
            for c in range(n_comp):
                total += stacked[p, c * n_nu + nu] * t[p, c]
            to_s[p, nu] = total
        for c in range(cuda.threadIdx.x, n_comp, cuda.blockDim.x):
            total = s.dtype.type(0.0)
            for nu in range(n_nu):
                total += stacked[p, c * n_nu + nu] * s[p, nu]
            to_t[p, c] = total
