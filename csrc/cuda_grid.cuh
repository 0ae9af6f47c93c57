// Blocks of a grid that meet, on any device: all of them have to be running (a cooperative launch sees to that).
#pragma once

#include "cuda_cluster.cuh"

namespace newllm {

// What another block may have written since it was last read.
__device__ __forceinline__ float load_fresh(const float* address) { return __ldcg(address); }

// All blocks that count on `arrived` come here, for the n-th time when `wanted` is n times their number. False when
// some did not within kPatience cycles. What they wrote before is seen after.
__device__ __forceinline__ bool meet(unsigned* arrived, unsigned wanted) {
    __syncthreads();
    bool came = true;
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        const long long since = clock64();
        while (static_cast<int>(*static_cast<volatile unsigned*>(arrived) - wanted) < 0 && came)
            came = clock64() - since < kPatience;
        __threadfence();
    }
    return __syncthreads_and(came);
}

}  // namespace newllm
