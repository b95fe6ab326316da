// The three sums, and the products with tensor components, in CUDA C. REAL is float or double.
//
//     envsum    env[i,nu,a]   = sum_{p in row i} sense[p,nu] features[sender(p),a]
//     sensesum  sense[p,nu]   = sum_a env[i,nu,a] features[sender(p),a]
//     messages  m[p,a]        = sum_nu sense[p,nu] env[i,nu,a]
//     gather    features[j,a] = sum_{p: sender(p) = j} m[p,a]          featsum = gather of messages
//
// The first three are small matrix products, one row of pairs (and one tile of nu or features) per
// block. A block stages tiles of both factors in shared memory, four numbers per load where rows
// start at multiples of 16 bytes; a thread holds 4 x 4 sums in registers and feeds 16 of their
// products by two loads of four numbers. So the env of a receiver is read once for 64 pairs, not
// once per pair. There are no atomics: two runs agree to the last bit. Offsets have 64 bits.
//
// Grids, blocks and bytes of shared memory: cuda_launch.py. The same kernels in Python:
// numba_cuda.py.

typedef REAL real;
typedef long long wide;

struct alignas(16) Four { real x[4]; };

#define TERMS 32                   // of a sum, staged at once
#define PAD (16 / int(sizeof(real)))  // keeps rows of a tile in different banks

extern __shared__ real shared[];

__device__ int thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }

// to[k][c] = from[index[k]][c], k < n_row, c < n_col; zero for c >= left. n_col divides by four.
// Without an index, rows follow each other.
__device__ void stage(
    real *to, int pitch, const real *from, wide stride, const int *index,
    int n_row, int n_col, int left)
{
    const bool whole = stride % 4 == 0 && size_t(from) % 16 == 0;
    const int per_row = n_col / 4;
    for (int k = thread_number(); k < n_row * per_row; k += blockDim.x * blockDim.y) {
        const int row = k / per_row, col = 4 * (k % per_row);
        const real *x = from + (index ? index[row] : row) * stride + col;
        Four four = {};
        if (whole && col < left)
            four = *(const Four *)x;
        else
            for (int m = 0; m < 4; m++)
                if (col + m < left) four.x[m] = x[m];
        *(Four *)(to + row * pitch + col) = four;
    }
}

// Blocks: receivers x tiles of features x tiles of nu. A thread has four features in a row and four
// nu in a row; the pairs of the row are the terms.
extern "C" __global__ void __launch_bounds__(256) envsum(
    const real *sense, const real *features, const int *row_ptr, const int *sender, real *env,
    int n_nu, int n_feat)
{
    const int width = 4 * blockDim.x, height = 4 * blockDim.y;
    const int a0 = blockIdx.y * width, nu0 = blockIdx.z * height;
    real *z = shared, *s = shared + TERMS * width;
    const wide i = blockIdx.x;
    const int end = row_ptr[i + 1];
    real sum[4][4] = {};
    for (int p = row_ptr[i]; p < end; p += TERMS) {
        const int n = min(TERMS, end - p);
        __syncthreads();
        stage(z, width, features + a0, n_feat, sender + p, n, width, n_feat - a0);
        stage(s, height, sense + wide(p) * n_nu + nu0, n_nu, nullptr, n, height, n_nu - nu0);
        __syncthreads();
        for (int k = 0; k < n; k++) {
            const Four left = *(const Four *)(s + k * height + 4 * threadIdx.y);
            const Four right = *(const Four *)(z + k * width + 4 * threadIdx.x);
            for (int m = 0; m < 4; m++)
                for (int l = 0; l < 4; l++) sum[m][l] += left.x[m] * right.x[l];
        }
    }
    const int nu = nu0 + 4 * threadIdx.y, a = a0 + 4 * threadIdx.x;
    for (int m = 0; m < 4 && nu + m < n_nu; m++)
        for (int l = 0; l < 4 && a + l < n_feat; l++)
            env[(i * n_nu + nu + m) * n_feat + a + l] = sum[m][l];
}

// Blocks: receivers x tiles of nu. A thread has the pairs y, y + n_y, ... and the nu x, x + n_x, ...
// of a tile; features are the terms, four at a time.
extern "C" __global__ void __launch_bounds__(256) sensesum(
    const real *env, const real *features, const int *row_ptr, const int *sender, real *sense,
    int n_nu, int n_feat)
{
    const int n_x = blockDim.x, n_y = blockDim.y, pitch = TERMS + PAD;
    const int nu0 = blockIdx.y * 4 * n_x;
    real *e = shared, *z = shared + 4 * n_x * pitch;
    const wide i = blockIdx.x;
    const int end = row_ptr[i + 1], live = min(4 * n_x, n_nu - nu0);
    for (int p = row_ptr[i]; p < end; p += 4 * n_y) {
        const int n = min(4 * n_y, end - p);
        real sum[4][4] = {};
        for (int a = 0; a < n_feat; a += TERMS) {
            __syncthreads();
            stage(e, pitch, env + (i * n_nu + nu0) * n_feat + a, n_feat, nullptr, live, TERMS,
                  n_feat - a);
            stage(z, pitch, features + a, n_feat, sender + p, n, TERMS, n_feat - a);
            __syncthreads();
            for (int k = 0; k < TERMS; k += 4) {
                Four left[4], right[4];
                for (int m = 0; m < 4; m++) {
                    left[m] = *(const Four *)(z + (threadIdx.y + m * n_y) * pitch + k);
                    right[m] = *(const Four *)(e + (threadIdx.x + m * n_x) * pitch + k);
                }
                for (int m = 0; m < 4; m++)
                    for (int l = 0; l < 4; l++)
                        for (int c = 0; c < 4; c++) sum[m][l] += left[m].x[c] * right[l].x[c];
            }
        }
        for (int m = 0; m < 4; m++)
            for (int l = 0; l < 4; l++) {
                const int k = threadIdx.y + m * n_y, nu = threadIdx.x + l * n_x;
                if (k < n && nu < live) sense[wide(p + k) * n_nu + nu0 + nu] = sum[m][l];
            }
    }
}

// Blocks: receivers x tiles of features. A thread has four features in a row and the pairs y,
// y + n_y, ... of a tile; nu are the terms. Of pairs outside first .. last - 1 nothing is written.
extern "C" __global__ void __launch_bounds__(256) messages(
    const real *env, const real *sense, const int *row_ptr, real *message,
    int n_nu, int n_feat, int first, int last)
{
    const int width = 4 * blockDim.x, n_y = blockDim.y, pitch = TERMS + PAD;
    const int a0 = blockIdx.y * width, a = a0 + 4 * threadIdx.x;
    real *e = shared, *s = shared + TERMS * width;
    const wide i = blockIdx.x;
    const int end = min(row_ptr[i + 1], last);
    for (int p = max(row_ptr[i], first); p < end; p += 4 * n_y) {
        const int n = min(4 * n_y, end - p);
        real sum[4][4] = {};
        for (int nu = 0; nu < n_nu; nu += TERMS) {
            const int n_term = min(TERMS, n_nu - nu);
            __syncthreads();
            stage(e, width, env + (i * n_nu + nu) * n_feat + a0, n_feat, nullptr, n_term, width,
                  n_feat - a0);
            stage(s, pitch, sense + wide(p) * n_nu + nu, n_nu, nullptr, n, TERMS, n_nu - nu);
            __syncthreads();
            for (int k = 0; k < n_term; k++) {
                const Four right = *(const Four *)(e + k * width + 4 * threadIdx.x);
                for (int m = 0; m < 4; m++) {
                    const real left = s[(threadIdx.y + m * n_y) * pitch + k];
                    for (int l = 0; l < 4; l++) sum[m][l] += left * right.x[l];
                }
            }
        }
        for (int m = 0; m < 4; m++)
            for (int l = 0; l < 4; l++) {
                const int k = threadIdx.y + m * n_y;
                if (k < n && a + l < n_feat)
                    message[wide(p - first + k) * n_feat + a + l] = sum[m][l];
            }
    }
}

// Blocks: senders, n_y at a time, x tiles of features. The pairs of a sender ascend in perm.
extern "C" __global__ void __launch_bounds__(256) gather(
    const real *message, const int *col_ptr, const int *perm, real *features,
    int n_send, int n_feat, int first, int last)
{
    const wide j = wide(blockIdx.x) * blockDim.y + threadIdx.y;
    const int a = blockIdx.y * blockDim.x + threadIdx.x;
    if (j >= n_send || a >= n_feat) return;
    real sum = first > 0 ? features[j * n_feat + a] : real(0);
    for (int k = col_ptr[j]; k < col_ptr[j + 1]; k++) {
        const int p = perm[k];
        if (p >= first && p < last) sum += message[wide(p - first) * n_feat + a];
    }
    features[j * n_feat + a] = sum;
}

// Products. Blocks: pairs, n_y at a time; a thread has the nu x, x + n_x, ...
//
//     stacked[p,(c,nu)] = t[p,c] s[p,nu]
extern "C" __global__ void __launch_bounds__(256) stack(
    const real *t, const real *s, real *stacked, int n_pair, int n_comp, int n_nu)
{
    const wide p = wide(blockIdx.x) * blockDim.y + threadIdx.y;
    if (p >= n_pair) return;
    for (int nu = threadIdx.x; nu < n_nu; nu += blockDim.x)
        for (int c = 0; c < n_comp; c++)
            stacked[(p * n_comp + c) * n_nu + nu] = t[p * n_comp + c] * s[p * n_nu + nu];
}

//     stacked[p,(c,nu)] = t[p,c] s'[p,nu] + t'[p,c] s[p,nu]
extern "C" __global__ void __launch_bounds__(256) stack_along(
    const real *t, const real *s, const real *dt, const real *ds, real *stacked,
    int n_pair, int n_comp, int n_nu)
{
    const wide p = wide(blockIdx.x) * blockDim.y + threadIdx.y;
    if (p >= n_pair) return;
    for (int nu = threadIdx.x; nu < n_nu; nu += blockDim.x)
        for (int c = 0; c < n_comp; c++)
            stacked[(p * n_comp + c) * n_nu + nu] =
                t[p * n_comp + c] * ds[p * n_nu + nu] + dt[p * n_comp + c] * s[p * n_nu + nu];
}

//     to_s[p,nu] = sum_c stacked[p,(c,nu)] t[p,c]      to_t[p,c] = sum_nu stacked[p,(c,nu)] s[p,nu]
//
// The second sum finds in the first-level cache what the first one has read.
extern "C" __global__ void __launch_bounds__(256) fold(
    const real *stacked, const real *t, const real *s, real *to_t, real *to_s,
    int n_pair, int n_comp, int n_nu)
{
    const wide p = wide(blockIdx.x) * blockDim.y + threadIdx.y;
    if (p >= n_pair) return;
    const real *g = stacked + p * n_comp * n_nu;
    for (int nu = threadIdx.x; nu < n_nu; nu += blockDim.x) {
        real sum = 0;
        for (int c = 0; c < n_comp; c++) sum += g[c * n_nu + nu] * t[p * n_comp + c];
        to_s[p * n_nu + nu] = sum;
    }
    for (int c = threadIdx.x; c < n_comp; c += blockDim.x) {
        real sum = 0;
        for (int nu = 0; nu < n_nu; nu++) sum += g[c * n_nu + nu] * s[p * n_nu + nu];
        to_t[p * n_comp + c] = sum;
    }
}
