"""Sensitivities, slope and curvature in Python for numba's CUDA: the kernels of `cuda_radial.cu`.

Blocks, threads and tiles are those of the kernels in CUDA C, which say why. What is launched:
`cuda_launch`. Equations: `radial_reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math

from numba import cuda

from md_plugin.kernels.cuda_launch import MOMENTS, PAIRS
from md_plugin.kernels.numba_cuda_sums import least
from md_plugin.kernels.radial_reference import FAR

# In shared memory, of each pair of a block, one after the other.
R, Q, C, C1, C2, RHO = (k * PAIRS for k in range(6))
TERM = 6 * PAIRS


@cuda.jit(device=True)
def thread_number():
    """In its block."""
    return cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x


@cuda.jit(device=True)
def tile_of_pairs(tile, r, n, rcut, end):
    """Write r, 1/r, the cutoff and its derivatives of the n pairs of this block."""
    real = r.dtype.type
    first = cuda.blockIdx.x * PAIRS
    scale, slope = real(0.5 * math.pi / rcut), real(-math.pi / rcut)
    for k in range(thread_number(), n, cuda.blockDim.x * cuda.blockDim.y):
        distance = r[first + k]
        sine, cosine = real(math.sin(distance * scale)), real(math.cos(distance * scale))
        inside = real(1.0) if distance < real(end) else real(0.0)
        tile[R + k], tile[Q + k] = distance, real(1.0) / distance
        tile[C + k] = inside * cosine * cosine
        tile[C1 + k] = inside * slope * sine * cosine
        curve = real(0.5) * slope * slope
        tile[C2 + k] = inside * curve * (sine * sine - cosine * cosine)


@cuda.jit(device=True)
def gaussian(t, real):
    """exp(-t^2/2), exactly 0 where t^2/2 >= 80; a NaN stays one."""
    exponent = real(-0.5) * t * t
    return real(0.0) if exponent <= real(FAR) else real(math.exp(exponent))


@cuda.jit(device=True)
def sum_of_terms(tile, n, width):
    """Of a pair, over the nu of this pass, in threads 0 .. n - 1."""
    total = tile.dtype.type(0.0)
    k = thread_number()
    if k < n:
        for x in range(cuda.blockDim.x):
            total += tile[TERM + k * width + x]
    return total


@cuda.jit(device=True)
def store_moments(moment, sums, n_kind, nu, n_nu):
    """sums[block, kind, nu] of this pass; thread 0 .. n_x - 1 has all kinds of one nu."""
    n_x, n_y = cuda.blockDim.x, cuda.blockDim.y
    if cuda.threadIdx.y == 0 and nu < n_nu:
        for kind in range(n_kind):
            total = moment.dtype.type(0.0)
            for y in range(n_y):
                total += moment[(kind * n_y + y) * n_x + cuda.threadIdx.x]
            sums[cuda.blockIdx.x, kind, nu] = total


@cuda.jit
def sensitivity(r, mu, sigma, sense, n_pair, n_nu, rcut, end):
    """Write sense."""
    real, first = r.dtype.type, cuda.blockIdx.x * PAIRS
    n = least(PAIRS, n_pair - first)
    tile = cuda.shared.array(0, r.dtype)
    tile_of_pairs(tile, r, n, rcut, end)
    cuda.syncthreads()
    for nu in range(cuda.threadIdx.x, n_nu, cuda.blockDim.x):
        inverse = real(1.0) / mu[nu]
        for k in range(cuda.threadIdx.y, n, cuda.blockDim.y):
            t = sigma[nu] * ((mu[nu] - tile[R + k]) * (tile[Q + k] * inverse))
            sense[first + k, nu] = gaussian(t, real) * tile[C + k]


@cuda.jit
def slope(grad, r, mu, sigma, grad_r, sums, n_pair, n_nu, trained, rcut, end):
    """Write grad_r, and where `trained` the sums over pairs of g s t and g s t u."""
    real, first, number = r.dtype.type, cuda.blockIdx.x * PAIRS, thread_number()
    x, y, n_x, n_y = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
    n, place = least(PAIRS, n_pair - first), y * n_x + x
    tile = cuda.shared.array(0, r.dtype)
    moment = tile[TERM + PAIRS * (n_x + 1) :]
    tile_of_pairs(tile, r, n, rcut, end)
    cuda.syncthreads()
    total = real(0.0)
    for nu0 in range(0, n_nu, n_x):
        nu, of_t, of_u = nu0 + x, real(0.0), real(0.0)
        for k in range(y, n, n_y):
            term = real(0.0)
            if nu < n_nu:
                q, c, width = tile[Q + k], tile[C + k], sigma[nu]
                u = (mu[nu] - tile[R + k]) * (q * (real(1.0) / mu[nu]))
                t = width * u
                weight = grad[first + k, nu] * gaussian(t, real)
                term = weight * (tile[C1 + k] + c * q * q * width * t)
                of_t += weight * c * t
                of_u += weight * c * t * u
            tile[TERM + k * (n_x + 1) + x] = term
        moment[place], moment[n_x * n_y + place] = of_t, of_u
        cuda.syncthreads()
        total += sum_of_terms(tile, n, n_x + 1)
        if trained:
            store_moments(moment, sums, 2, nu, n_nu)
        cuda.syncthreads()
    if number < n:
        grad_r[first + number] = total


@cuda.jit(device=True)
def curve(tile, k, mu, sigma, alpha, beta, real):
    """h/G, e, c t, e u + c t D u, and what grad_r has of them, of one pair and nu; and G."""
    q, c, along, inverse = tile[Q + k], tile[C + k], tile[RHO + k], real(1.0) / mu
    u = (mu - tile[R + k]) * (q * inverse)
    t = sigma * u
    du = alpha * inverse * inverse - along * q * q
    dt = sigma * du + beta * u
    across = along * tile[C1 + k] - c * t * dt
    e, flat = t * across + c * dt, c * t
    of_r = q * q * (sigma * e + flat * (beta - real(2.0) * sigma * along * q))
    of_r += along * tile[C2 + k] - tile[C1 + k] * t * dt
    return across, e, flat, e * u + flat * du, of_r, gaussian(t, real)


@cuda.jit
def curvature(grad, r, mu, sigma, rho, alpha, beta, h, grad_r, sums, n_pair, n_nu, rcut, end):
    """Write h, grad_r, and the sums over pairs of g G e, g G c t and g G (e u + c t D u)."""
    real, first, number = r.dtype.type, cuda.blockIdx.x * PAIRS, thread_number()
    x, y, n_x, n_y = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
    n, place = least(PAIRS, n_pair - first), y * n_x + x
    tile = cuda.shared.array(0, r.dtype)
    moment = tile[TERM + PAIRS * (n_x + 1) :]
    tile_of_pairs(tile, r, n, rcut, end)
    if number < n:
        tile[RHO + number] = rho[first + number]
    cuda.syncthreads()
    total = real(0.0)
    for nu0 in range(0, n_nu, n_x):
        nu, steep, flat, of_sigma = nu0 + x, real(0.0), real(0.0), real(0.0)
        for k in range(y, n, n_y):
            term = real(0.0)
            if nu < n_nu:
                across, e, ct, both, of_r, value = curve(
                    tile, k, mu[nu], sigma[nu], alpha[nu], beta[nu], real
                )
                h[first + k, nu] = value * across
                weight = value * grad[first + k, nu]
                steep += weight * e
                flat += weight * ct
                of_sigma += weight * both
                term = weight * of_r
            tile[TERM + k * (n_x + 1) + x] = term
        moment[place], moment[n_x * n_y + place] = steep, flat
        moment[2 * n_x * n_y + place] = of_sigma
        cuda.syncthreads()
        total += sum_of_terms(tile, n, n_x + 1)
        store_moments(moment, sums, MOMENTS, nu, n_nu)
        cuda.syncthreads()
    if number < n:
        grad_r[first + number] = total
