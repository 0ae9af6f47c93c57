// Products of a block's inputs with its rows of matrices, in the sweeps that need no clusters.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda_cluster.cuh"
#include "cuda_lanes.cuh"

namespace newllm {

constexpr int kGridThreads = 384;
constexpr int kGridWarps = kGridThreads / 32;

__host__ __device__ inline int even(int64_t n) { return static_cast<int>((n + 1) / 2 * 2); }

// The block's rows of matrices, in elements: matrix [group], row [output], piece of its row [segment].
struct GridMatrix {
    const void* data;  // in global memory; null: kept
    size_t kept;       // bytes from the beginning of shared memory
    int64_t group;
    int row, segment;
};

// What is multiplied with what, and where in shared memory inputs are and results go, in bytes.
struct GridFactors {
    GridMatrix matrix;
    int64_t group;
    size_t inputs, parts;
    int inputs_apart, products, count, groups, outputs, segments, width;
};

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float2 number_pair(const float* x) { return *reinterpret_cast<const float2*>(x); }
__device__ __forceinline__ float2 number_pair(const __nv_bfloat16* x) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}

// This thread's columns of the inputs times as many rows of a matrix as are summed up together, from `weight` on,
// `apart` from each other; two: the second of the pair of columns exists.
template <int kRows, int kChunk, class Value, bool kKept>
__device__ __forceinline__ void add_products(const float* inputs, const Value* weight, int apart, int outputs, bool two,
                                             const GridFactors& of, float (&sums)[kChunk * kRows]) {
    float2 x[kRows];
#pragma unroll
    for (int row = 0; row < kRows; row++) {
        x[row] = row < of.count ? number_pair(inputs + row * of.inputs_apart) : float2{0.0f, 0.0f};
        if (!two) x[row].y = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kChunk; c++) {
        // Beyond the last output its row stands in, so that no load waits for a branch.
        const Value* const row_of = weight + min(c, outputs - 1) * apart;
        const float2 w = kKept ? number_pair(row_of) : float2{number(row_of[0]), number(row_of[two])};
#pragma unroll
        for (int row = 0; row < kRows; row++)
            sums[c * kRows + row] = fmaf(w.y, x[row].y, fmaf(w.x, x[row].x, sums[c * kRows + row]));
    }
}

// By the warp, its share of every product. Called, not inlined: the compiler would make it a dozen times.
template <int kRows, class Value, bool kKept>
__device__ __noinline__ void grid_products(const GridFactors of) {
    constexpr int kChunk = kRows == 1 ? 8 : 32 / kRows, n = kChunk * kRows;
    const int lane = threadIdx.x % 32;
    const float* const inputs = reinterpret_cast<const float*>(dynamic_shared() + of.inputs);
    float* const parts =
        reinterpret_cast<float*>(dynamic_shared() + of.parts) + threadIdx.x / 32 * of.products * kRows;
    const void* const data = kKept ? dynamic_shared() + of.matrix.kept : of.matrix.data;
    for (int g = 0; g < of.groups; g++)
        for (int output = 0; output < of.outputs; output += kChunk) {
            const Value* const rows = static_cast<const Value*>(data) + (of.group + g) * of.matrix.group +
                                      int64_t(output) * of.matrix.row;
            float sums[n] = {};
            for (int segment = 0; segment < of.segments; segment++)
#pragma unroll 1
                for (int k = 2 * threadIdx.x; k < of.width; k += 2 * kGridThreads)
                    add_products<kRows, kChunk, Value, kKept>(
                        inputs + segment * even(of.width) + k, rows + segment * of.matrix.segment + k, of.matrix.row,
                        of.outputs - output, k + 1 < of.width, of, sums);
            const float total = sum_of_lanes<n>(sums, lane);
            const int value = lane / (32 / n);
            if (lane % (32 / n) == 0 && output + value / kRows < of.outputs)
                parts[(g * of.outputs + output) * kRows + value] = total;
        }
}

}  // namespace newllm
