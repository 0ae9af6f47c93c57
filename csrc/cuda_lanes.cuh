// Sums over the lanes of a warp, of several values at a time.
#pragma once

namespace newllm {

// Sums over lanes that differ in `mask`, of 2n values; a lane keeps the n of its own side.
template <int n>
__device__ __forceinline__ void halve(float* values, int mask, int lane) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < n; i++) {
        const float kept = upper ? values[n + i] : values[i];
        const float given = upper ? values[i] : values[n + i];
        values[i] = kept + __shfl_xor_sync(~0u, given, mask);
    }
}

// Sums over all lanes of `count` values (a power of 2, 32 at most); a lane gets that of value lane * count / 32.
template <int count>
__device__ __forceinline__ float sum_of_lanes(float* values, int lane) {
    if constexpr (count > 16) halve<16>(values, 16, lane);
    constexpr int first = count > 16 ? 8 : 16;
    if constexpr (count > 8) halve<8>(values, first, lane);
    constexpr int second = count > 8 ? first / 2 : first;
    if constexpr (count > 4) halve<4>(values, second, lane);
    constexpr int third = count > 4 ? second / 2 : second;
    if constexpr (count > 2) halve<2>(values, third, lane);
    constexpr int fourth = count > 2 ? third / 2 : third;
    if constexpr (count > 1) halve<1>(values, fourth, lane);
#pragma unroll
    for (int mask = 16 / count; mask > 0; mask /= 2) values[0] += __shfl_xor_sync(~0u, values[0], mask);
    return values[0];
}

}  // namespace newllm
