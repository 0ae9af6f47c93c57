// The skeleton of the sweeps that need no clusters: products of a few rows, one after the other, by a team of blocks.
//
// A team takes kGridRows rows at most at a time and sweeps all their tokens. In a stage every block has the rows'
// whole vectors in its shared memory and a warp makes one column of the product at a time; what the next stage reads
// goes through global memory, and the team meets. W is read from the caches.
#pragma once

#include <cuda_bf16.h>

#include "context_arguments_cuda.cuh"
#include "context_cell.h"
#include "cuda_grid.cuh"

namespace newllm {

constexpr int kGridRows = 8;
constexpr int kGridThreads = 256;
constexpr int kGridWarps = kGridThreads / 32;

struct GridTeams {
    int rows;           // that a team takes at a time
    int teams, blocks;  // teams, and blocks of each
    unsigned* arrived;  // [teams], zeros at the beginning
    float* buffers;     // [2, runs, widest], between stages
    int64_t widest;
    int* timeout;
    bool half;          // matrices are bfloat16
};

template <class Sweep>
struct GridMember {
    const Sweep& sweep;
    const GridTeams& team;
    const int block;  // of the team
    int64_t first;    // row
    int count;        // rows
    unsigned met = 0;
    bool alive = true;

    __device__ GridMember(const Sweep& sweep, const GridTeams& team)
        : sweep(sweep), team(team), block(blockIdx.x % team.blocks), first(0), count(0) {}

    __device__ void wait() {
        met += team.blocks;
        // After a wait that was given up nothing is waited for, so that all come to the end.
        if (alive) alive = meet(team.arrived + blockIdx.x / team.blocks, met);
        else __syncthreads();
    }

    // In arrays with one entry a token.
    __device__ int64_t token(int row, int64_t step) const { return first_token(sweep.span, first + row) + step; }
    __device__ float* buffer(int turn, int row) const {
        return team.buffers + (turn * runs(sweep.span) + first + row) * team.widest;
    }
    // Whether this block is the one to write a column that all of them have.
    __device__ bool writes(int64_t column) const { return column / 32 % team.blocks == block; }

    // use(row, column) for all of the rows' columns, by all threads.
    template <class Use>
    __device__ void each(int64_t width, Use use) const {
        for (int row = 0; row < count; row++)
            for (int64_t column = threadIdx.x; column < width; column += kGridThreads) use(row, column);
    }

    // use(row, lane) for each row, by a warp.
    template <class Use>
    __device__ void each_row(Use use) const {
        __syncthreads();
        for (int row = threadIdx.x / 32; row < count; row += kGridWarps) use(row, int64_t(threadIdx.x % 32));
        __syncthreads();
    }

    // use(row, column, sums): the products of W's rows column, column + outputs, ... with the row of x [rows, inputs].
    template <int Products, class Use>
    __device__ void multiply(const void* weight, int64_t offset, int64_t outputs, int64_t inputs, const float* x,
                             Use use) const {
        if (team.half)
            products<Products>(static_cast<const __nv_bfloat16*>(weight) + offset, outputs, inputs, x, use);
        else
            products<Products>(static_cast<const float*>(weight) + offset, outputs, inputs, x, use);
    }

  private:
    static __device__ float number(float x) { return x; }
    static __device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

    template <int Products, class Value, class Use>
    __device__ void products(const Value* weight, int64_t outputs, int64_t inputs, const float* x, Use use) const {
        const int lane = threadIdx.x % 32, warps = team.blocks * kGridWarps;
        __syncthreads();
        for (int64_t column = block * kGridWarps + threadIdx.x / 32; column < outputs; column += warps) {
            float sums[Products][kGridRows] = {};
            for (int64_t i = lane; i < inputs; i += 32)
#pragma unroll
                for (int p = 0; p < Products; p++) {
                    const float w = number(weight[(p * outputs + column) * inputs + i]);
#pragma unroll
                    for (int row = 0; row < kGridRows; row++)
                        if (row < count) sums[p][row] = fmaf(w, x[row * inputs + i], sums[p][row]);
                }
            float own[Products] = {};
#pragma unroll
            for (int p = 0; p < Products; p++)
#pragma unroll
                for (int row = 0; row < kGridRows; row++) {
                    float sum = sums[p][row];
                    for (int mask = 16; mask; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
                    if (row == lane) own[p] = sum;
                }
            if (lane < count) use(lane, column, own);
        }
    }
};

__device__ __forceinline__ float sum_warp(float value) {
    for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
    return value;
}

// Replaces rows x [rows, width] by their layer norm.
template <class Member>
__device__ void layer_norm_rows(const Member& member, float* x, int64_t width, const float* gain, const float* shift) {
    member.each_row([&](int row, int64_t lane) {
        float* const u = x + row * width;
        float total = 0.0f, squares = 0.0f;
        for (int64_t i = lane; i < width; i += 32) total += u[i];
        const float mean = sum_warp(total) / width;
        for (int64_t i = lane; i < width; i += 32) squares = fmaf(u[i] - mean, u[i] - mean, squares);
        const float rstd = rsqrtf(sum_warp(squares) / width + kLayerNormEps);
        for (int64_t i = lane; i < width; i += 32) u[i] = fmaf((u[i] - mean) * rstd, gain[i], shift[i]);
    });
}

// Replaces rows x [rows, width] of gradients of a layer norm's result by those of what it read; place(row) counts its
// entries in `normed` [.., width] and `rstd`.
template <class Member, class Place>
__device__ void layer_norm_rows_gradient(const Member& member, float* x, int64_t width, const float* gain,
                                         const float* normed, const float* rstd, Place place) {
    member.each_row([&](int row, int64_t lane) {
        float* const total = x + row * width;
        const float* const own = normed + place(row) * width;
        float plain = 0.0f, product = 0.0f;
        for (int64_t i = lane; i < width; i += 32) {
            total[i] *= gain[i];
            plain += total[i];
            product = fmaf(total[i], own[i], product);
        }
        const float mean = sum_warp(plain) / width, mean_normed = sum_warp(product) / width;
        for (int64_t i = lane; i < width; i += 32)
            total[i] = layer_norm_gradient(total[i], own[i], mean, mean_normed, rstd[place(row)]);
    });
}

// Task: what a team does with its rows, all tokens.
template <class Task>
__global__ void __launch_bounds__(kGridThreads, 1)
    sweep_grid_kernel(const typename Task::Sweep sweep, const GridTeams team) {
    GridMember<typename Task::Sweep> member(sweep, team);
    float* const shared = reinterpret_cast<float*>(dynamic_shared());
    const int64_t all = runs(sweep.span), apart = int64_t(team.teams) * team.rows;
    for (int64_t first = int64_t(blockIdx.x / team.blocks) * team.rows; first < all; first += apart) {
        member.first = first;
        member.count = static_cast<int>(min(int64_t(team.rows), all - first));
        Task::run(member, shared);
        member.wait();
    }
    if (!member.alive && threadIdx.x == 0) give_up(team.timeout);
}

}  // namespace newllm
