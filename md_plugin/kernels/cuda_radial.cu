// Sensitivities, their slope and their curvature in CUDA C; follows cuda_sums.cu in one text.
//
// Equations: radial_reference.py. u is taken as (mu - r) / (r mu), which does not cancel.
//
// Blocks: PAIRS pairs each. What depends on r alone is computed once per pair and kept in shared
// memory. A thread has the nu x, x + n_x, ... of the pairs y, y + n_y, ...: loads and stores of
// neighbouring threads follow each other. Sums over nu go through shared memory; sums over pairs,
// for the gradients of mu and sigma, stay in registers, are added up in the block, and leave it as
// sums[block][kind][nu]; the host adds the blocks in float64. No atomics.

#define PAIRS 64
#define MOMENTS 3

struct Tile {
    real *r, *q, *c, *c1, *c2, *rho;  // of each pair: r, 1/r, the cutoff and its derivatives, rho
    real *term;                       // [PAIRS][n_x + 1]
    real *moment;                     // [MOMENTS][n_y][n_x]
    wide first;
    int n;
};

__device__ Tile tile_of_pairs(
    const real *r, const real *rho, int n_pair, double rcut, double end)
{
    real *x = shared;
    Tile tile = {x, x + PAIRS, x + 2 * PAIRS, x + 3 * PAIRS, x + 4 * PAIRS, x + 5 * PAIRS};
    tile.term = x + 6 * PAIRS;
    tile.moment = tile.term + PAIRS * (blockDim.x + 1);
    tile.first = wide(blockIdx.x) * PAIRS;
    tile.n = int(min(wide(PAIRS), n_pair - tile.first));
    const real slope = real(-3.141592653589793 / rcut);
    for (int k = thread_number(); k < tile.n; k += blockDim.x * blockDim.y) {
        const real distance = r[tile.first + k], half = distance * real(0.5 / rcut);
        const real sine = sinpi(half), cosine = cospi(half);
        const bool inside = distance < real(end);
        tile.r[k] = distance;
        tile.q[k] = 1 / distance;
        tile.c[k] = inside ? cosine * cosine : real(0);
        tile.c1[k] = inside ? slope * sine * cosine : real(0);
        tile.c2[k] =
            inside ? real(0.5) * slope * slope * (sine * sine - cosine * cosine) : real(0);
        tile.rho[k] = rho ? rho[tile.first + k] : real(0);
    }
    __syncthreads();
    return tile;
}

// exp(-t^2/2), exactly 0 where t^2/2 >= 80; a NaN stays one.
__device__ real gaussian(real t)
{
    const real exponent = t * t * real(-0.7213475204444817);
    return exponent <= real(-115.41560327111707) ? real(0) : exp2(exponent);
}

// The sum of a pair's terms over the nu of this pass, in threads 0 .. n - 1.
__device__ real sum_of_terms(const Tile &tile)
{
    real sum = 0;
    const int k = thread_number(), n_x = blockDim.x;
    if (k < tile.n)
        for (int x = 0; x < n_x; x++) sum += tile.term[k * (n_x + 1) + x];
    return sum;
}

// sums[block][kind][nu] of this pass; thread 0 .. n_x - 1 has all kinds of one nu.
__device__ void store_moments(const Tile &tile, real *sums, int n_kind, int nu, int n_nu)
{
    const int n_x = blockDim.x, n_y = blockDim.y;
    if (threadIdx.y > 0 || nu >= n_nu) return;
    for (int kind = 0; kind < n_kind; kind++) {
        real sum = 0;
        for (int y = 0; y < n_y; y++) sum += tile.moment[(kind * n_y + y) * n_x + threadIdx.x];
        sums[(wide(blockIdx.x) * MOMENTS + kind) * n_nu + nu] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) sensitivity(
    const real *r, const real *mu, const real *sigma, real *sense,
    int n_pair, int n_nu, double rcut, double end)
{
    const Tile tile = tile_of_pairs(r, nullptr, n_pair, rcut, end);
    for (int nu = threadIdx.x; nu < n_nu; nu += blockDim.x) {
        const real centre = mu[nu], inverse = 1 / centre, width = sigma[nu];
        for (int k = threadIdx.y; k < tile.n; k += blockDim.y) {
            const real t = width * ((centre - tile.r[k]) * (tile.q[k] * inverse));
            sense[(tile.first + k) * n_nu + nu] = gaussian(t) * tile.c[k];
        }
    }
}

// grad_r, and where `trained` the sums over pairs of g s t and g s t u.
extern "C" __global__ void __launch_bounds__(256) slope(
    const real *grad, const real *r, const real *mu, const real *sigma, real *grad_r, real *sums,
    int n_pair, int n_nu, int trained, double rcut, double end)
{
    const Tile tile = tile_of_pairs(r, nullptr, n_pair, rcut, end);
    const int n_x = blockDim.x, n_y = blockDim.y;
    real total = 0;
    for (int nu0 = 0; nu0 < n_nu; nu0 += n_x) {
        const int nu = nu0 + threadIdx.x;
        const bool live = nu < n_nu;
        const real centre = live ? mu[nu] : real(1), width = live ? sigma[nu] : real(0);
        const real inverse = 1 / centre;
        real of_t = 0, of_u = 0;
        for (int k = threadIdx.y; k < tile.n; k += n_y) {
            real term = 0;
            if (live) {
                const real q = tile.q[k], c = tile.c[k];
                const real u = (centre - tile.r[k]) * (q * inverse), t = width * u;
                const real weight = grad[(tile.first + k) * n_nu + nu] * gaussian(t);
                term = weight * (tile.c1[k] + c * q * q * width * t);
                of_t += weight * c * t;
                of_u += weight * c * t * u;
            }
            tile.term[k * (n_x + 1) + threadIdx.x] = term;
        }
        tile.moment[threadIdx.y * n_x + threadIdx.x] = of_t;
        tile.moment[(n_y + threadIdx.y) * n_x + threadIdx.x] = of_u;
        __syncthreads();
        total += sum_of_terms(tile);
        if (trained) store_moments(tile, sums, 2, nu, n_nu);
        __syncthreads();
    }
    if (thread_number() < tile.n) grad_r[tile.first + thread_number()] = total;
}

// h, grad_r, and the sums over pairs of g G e, g G c t and g G (e u + c t D u).
extern "C" __global__ void __launch_bounds__(256) curvature(
    const real *grad, const real *r, const real *mu, const real *sigma, const real *rho,
    const real *alpha, const real *beta, real *h, real *grad_r, real *sums,
    int n_pair, int n_nu, double rcut, double end)
{
    const Tile tile = tile_of_pairs(r, rho, n_pair, rcut, end);
    const int n_x = blockDim.x, n_y = blockDim.y;
    real total = 0;
    for (int nu0 = 0; nu0 < n_nu; nu0 += n_x) {
        const int nu = nu0 + threadIdx.x;
        const bool live = nu < n_nu;
        const real centre = live ? mu[nu] : real(1), width = live ? sigma[nu] : real(0);
        const real a = live ? alpha[nu] : real(0), b = live ? beta[nu] : real(0);
        const real inverse = 1 / centre;
        real steep = 0, flat = 0, of_sigma = 0;
        for (int k = threadIdx.y; k < tile.n; k += n_y) {
            real term = 0;
            if (live) {
                const wide place = (tile.first + k) * n_nu + nu;
                const real q = tile.q[k], c = tile.c[k], along = tile.rho[k];
                const real u = (centre - tile.r[k]) * (q * inverse), t = width * u;
                const real du = a * inverse * inverse - along * q * q, dt = width * du + b * u;
                const real across = along * tile.c1[k] - c * t * dt, value = gaussian(t);
                h[place] = value * across;
                const real weight = value * grad[place], e = t * across + c * dt;
                steep += weight * e;
                flat += weight * c * t;
                of_sigma += weight * (e * u + c * t * du);
                term = weight * (q * q * (width * e + c * t * (b - 2 * width * along * q))
                                 + along * tile.c2[k] - tile.c1[k] * t * dt);
            }
            tile.term[k * (n_x + 1) + threadIdx.x] = term;
        }
        tile.moment[threadIdx.y * n_x + threadIdx.x] = steep;
        tile.moment[(n_y + threadIdx.y) * n_x + threadIdx.x] = flat;
        tile.moment[(2 * n_y + threadIdx.y) * n_x + threadIdx.x] = of_sigma;
        __syncthreads();
        total += sum_of_terms(tile);
        store_moments(tile, sums, MOMENTS, nu, n_nu);
        __syncthreads();
    }
    if (thread_number() < tile.n) grad_r[tile.first + thread_number()] = total;
}
