// Products on tensor cores, sum += A B, of one warp: A 16 x 16 and B 16 x 8.
//
// Lane 4 g + t holds of A rows g and g + 8, of B column g, and of both the same four of the sixteen that are summed
// over; which these are does not matter as long as A and B agree, so that a lane may take neighbours. Of the sum it
// holds rows g (entries 0 and 1) and g + 8 (2 and 3), columns 2 t and 2 t + 1.
#pragma once

#include <cstdint>

namespace newllm {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A 16 x 16 in bfloat16, two neighbours a word: rows g, g + 8, g, g + 8 of B's first word, first, second, second.
__device__ __forceinline__ void multiply_bfloat16(float (&sum)[4], const uint32_t* a, uint32_t first, uint32_t second) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// Two numbers, rounded, in a word.
__device__ __forceinline__ uint32_t pack_bfloat16(float lower, float upper) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
    return word;
}

#endif

}  // namespace newllm
