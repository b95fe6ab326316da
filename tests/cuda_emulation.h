// CUDA C as C++: each thread of a block is a fibre, __syncthreads() a change of fibres.
//
// Blocks run one after the other. In each round between barriers the fibres of a block run in
// another order, so that a missing barrier changes results. Shared memory is full of NaN when a
// block starts; what lies behind the bytes that the launch asked for is watched.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(n)

using std::exp2;
using std::max;
using std::min;

// CUDA has them; C only from 2023 on, under the same names.
#define sinpi emulated_sinpi
#define cospi emulated_cospi
template <class T> T sinpi(T x) { return std::sin(T(M_PI) * x); }
template <class T> T cospi(T x) { return std::cos(T(M_PI) * x); }

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum Fault { NONE, BARRIER_NOT_REACHED_BY_ALL, SHARED_MEMORY_OVERRUN };

constexpr size_t STACK = 1 << 16;

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    Index thread;
    bool done;
};

static ucontext_t scheduler;
static Fibre *current;
static std::function<void()> kernel;

static void leave() { swapcontext(&current->context, &scheduler); }

static void enter()
{
    kernel();
    current->done = true;
    leave();
}

static Fault run_block(std::vector<Fibre> &fibres)
{
    const size_t n = fibres.size();
    for (size_t k = 0; k < n; k++) {
        Fibre &fibre = fibres[k];
        fibre.thread = {unsigned(k) % blockDim.x, unsigned(k) / blockDim.x, 0};
        fibre.done = false;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = STACK;
        makecontext(&fibre.context, enter, 0);
    }
    for (unsigned round = blockIdx.x;; round++) {
        size_t n_done = 0;
        for (size_t k = 0; k < n; k++) {
            const size_t turn = (k + 7 * round) % n;
            current = &fibres[round % 2 ? turn : n - 1 - turn];
            threadIdx = current->thread;
            swapcontext(&scheduler, &current->context);
            n_done += current->done;
        }
        if (n_done == n) return NONE;
        if (n_done > 0) return BARRIER_NOT_REACHED_BY_ALL;
    }
}

static Fault run(const int *grid, const int *block, char *shared, size_t room, size_t bytes)
{
    gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
    blockDim = {unsigned(block[0]), unsigned(block[1]), 1};
    static std::vector<Fibre> fibres;
    fibres.resize(size_t(block[0]) * block[1]);
    const std::vector<char> behind(room - bytes, 0x5a);
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                std::memset(shared, 0xff, bytes);
                std::memset(shared + bytes, 0x5a, room - bytes);
                if (const Fault fault = run_block(fibres)) return fault;
                if (std::memcmp(shared + bytes, behind.data(), room - bytes))
                    return SHARED_MEMORY_OVERRUN;
            }
    return NONE;
}

}  // namespace emulation

static void __syncthreads() { emulation::leave(); }
