// The skeleton of a sweep of many rows on thread-block clusters and tensor cores: one exchange a token.
//
// A cluster sweeps eight rows, and each of its blocks makes kColumns columns of their vectors. The warps of a block
// share the products: two halves of its columns by four quarters of the arriving vector, with W in registers (and
// where these do not suffice in shared memory). Then warp w has row w: it adds the quarters' sums up, makes the row's
// columns of the next vector (`Step`, forward or adjoint) and its share of two sums over the columns, and the block
// copies them to every block of the cluster. With bfloat16 weights the vector travels in bfloat16, its sums in float32;
// float32 weights are multiplied by three products in tf32.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

#include "cuda_cluster.cuh"
#include "cuda_tensor.cuh"

namespace newllm {

constexpr int kTensorRows = 8;
constexpr int kTensorThreads = 32 * kTensorRows;

// Strips: of 32 columns, of a block. Resident: how many of a warp's kTiles pieces of W (16 x 16) are in registers.
template <bool Half, int Strips, int Blocks, int Resident>
struct TensorTile {
    static constexpr bool kHalf = Half;
    static constexpr int kStrips = Strips, kBlocks = Blocks, kResident = Resident;
    static constexpr int kColumns = 32 * Strips;
    static constexpr int kBands = Blocks * kColumns / 64;  // of 16 columns, in a quarter of the vector
    static constexpr int kTiles = Strips * kBands;
    static constexpr int kWords = Half ? 4 : 8;          // of a lane, for one piece of W
    static constexpr int kChunks = (Half ? 1 : 2) * Strips;  // a block's columns by runs of 64 bytes of each row
    static constexpr int kChunkBytes = 64 * kTensorRows;
    static constexpr int kMessage = kChunks * kChunkBytes + kTensorRows * sizeof(float2);
    static constexpr int kVector = Blocks * kMessage;  // bytes
    static constexpr int kStride = kColumns + 4;       // of the quarters' sums; keeps lanes on different banks
    static_assert((Blocks == 4 || Blocks == 8) && Resident <= kTiles, "");
};

// Where things lie in a block's shared memory, in bytes.
template <class Tile>
struct TensorLayout {
    static constexpr size_t outbox = 2 * Tile::kVector;
    static constexpr size_t sums = outbox + 2 * Tile::kMessage;
    static constexpr size_t weights = sums + 4 * kTensorRows * Tile::kStride * sizeof(float);
    static constexpr size_t barriers =
        weights + (Tile::kTiles - Tile::kResident) * Tile::kWords * sizeof(uint32_t) * kTensorThreads;
    static constexpr size_t total = barriers + 2 * sizeof(uint64_t);
};

// What a lane is responsible for: of row `row` the columns first, first + 32, ...
struct RowPlace {
    int warp, lane, rank;
    int first, width;
    int64_t row;

    __device__ __forceinline__ int column(int strip) const { return first + 32 * strip; }
    __device__ __forceinline__ bool owns(int strip) const { return column(strip) < width; }
};

template <int Strips>
struct RowArrival {
    float product[Strips], first_sum, second_sum;
};
template <int Strips>
struct RowDeparture {
    float value[Strips], first, second;  // the lane's columns, and what they add to the two sums
};

// The sum over the lanes of groups of `lanes`.
template <int lanes>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
    for (int mask = 1; mask < lanes; mask <<= 1) value += __shfl_xor_sync(~0u, value, mask);
    return value;
}

#ifdef NEWLLM_CLUSTERS

template <class Tile>
struct TensorSweeper {
    using Layout = TensorLayout<Tile>;
    static constexpr int kStrips = Tile::kStrips;

    const RowPlace place;
    uint32_t weight[Tile::kResident][Tile::kWords];

    static __device__ __forceinline__ char* vector(int buffer) { return dynamic_shared() + buffer * Tile::kVector; }
    static __device__ __forceinline__ char* outbox(int buffer) {
        return dynamic_shared() + Layout::outbox + buffer * Tile::kMessage;
    }
    // [quarter, row, column] of the block.
    static __device__ __forceinline__ float* sums(int quarter, int row) {
        return reinterpret_cast<float*>(dynamic_shared() + Layout::sums) +
               (quarter * kTensorRows + row) * Tile::kStride;
    }
    static __device__ __forceinline__ uint64_t* barrier(int buffer) {
        return reinterpret_cast<uint64_t*>(dynamic_shared() + Layout::barriers) + buffer;
    }
    static __device__ __forceinline__ uint4* stored(int tile, int quad) {
        return reinterpret_cast<uint4*>(dynamic_shared() + Layout::weights) +
               ((tile - Tile::kResident) * (Tile::kWords / 4) + quad) * kTensorThreads + threadIdx.x;
    }
    __device__ __forceinline__ int half() const { return place.warp % 2; }
    __device__ __forceinline__ int quarter() const { return place.warp / 2; }

    static __device__ __forceinline__ float load(const void* matrix, int index) {
        if constexpr (Tile::kHalf) return __bfloat162float(static_cast<const __nv_bfloat16*>(matrix)[index]);
        return static_cast<const float*>(matrix)[index];
    }

    // A lane's entry of W's piece: by row of the piece (lower or upper half) and by which of its four columns.
    template <class Step>
    __device__ __forceinline__ uint32_t load_entry(const void* matrix, int band, int strip, int upper, int i) const {
        const int group = place.lane / 4, t = place.lane % 4, width = place.width;
        const int to = place.rank * Tile::kColumns + (half() * kStrips + strip) * 16 + upper * 8 + group;
        const int within = Tile::kHalf ? band / 2 * 32 + 8 * t + band % 2 * 4 : band * 16 + 4 * t;
        const int from = quarter() * Tile::kBands * 16 + within + i;
        if (to >= width || from >= width) return 0;
        const int index = Step::index(width, to, from);
        if constexpr (Tile::kHalf) return static_cast<const uint16_t*>(matrix)[index];
        return static_cast<const uint32_t*>(matrix)[index];
    }

    template <class Step>
    __device__ __forceinline__ void load_tile(const void* matrix, int tile, uint32_t (&words)[Tile::kWords]) const {
        const int band = tile / kStrips, strip = tile % kStrips;
#pragma unroll
        for (int k = 0; k < Tile::kWords; k++) {
            if constexpr (Tile::kHalf) {
                const uint32_t even = load_entry<Step>(matrix, band, strip, k % 2, k / 2 * 2);
                words[k] = even | load_entry<Step>(matrix, band, strip, k % 2, k / 2 * 2 + 1) << 16;
            } else {
                words[k] = load_entry<Step>(matrix, band, strip, k % 2, k / 2);
            }
        }
    }

    template <class Step>
    __device__ __forceinline__ void load_weights(const void* matrix) {
#pragma unroll
        for (int tile = 0; tile < Tile::kResident; tile++) load_tile<Step>(matrix, tile, weight[tile]);
        for (int tile = Tile::kResident; tile < Tile::kTiles; tile++) {
            uint32_t words[Tile::kWords];
            load_tile<Step>(matrix, tile, words);
#pragma unroll
            for (int q = 0; q < Tile::kWords / 4; q++)
                *stored(tile, q) = make_uint4(words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]);
        }
    }

    // Four words of a piece of W.
    __device__ __forceinline__ void take(int tile, int quad, uint32_t (&words)[4]) const {
        if (tile < Tile::kResident) {
#pragma unroll
            for (int k = 0; k < 4; k++) words[k] = weight[tile < Tile::kResident ? tile : 0][4 * quad + k];
        } else {
            const uint4 loaded = *stored(tile, quad);
            words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
        }
    }

    // The products of the warp's half of W's rows with its quarter of the vectors.
    __device__ __forceinline__ void multiply(int buffer, float (&sum)[2][kStrips][4]) const {
        constexpr int sources = Tile::kBlocks / 4;  // blocks that made a quarter
        const char* const mine = vector(buffer) + quarter() * sources * Tile::kMessage + place.lane * sizeof(uint4);
#pragma unroll
        for (int c = 0; c < sources * Tile::kChunks; c++) {
            const uint4 x = *reinterpret_cast<const uint4*>(mine + c / Tile::kChunks * Tile::kMessage +
                                                            c % Tile::kChunks * Tile::kChunkBytes);
            const uint32_t entries[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const uint32_t first = entries[2 * part], second = entries[2 * part + 1];
#pragma unroll
                for (int strip = 0; strip < kStrips; strip++) {
                    uint32_t words[4];
                    if constexpr (Tile::kHalf) {
                        take((2 * c + part) * kStrips + strip, 0, words);
                        multiply_bfloat16(sum[part][strip], words, first, second);
                    } else {
                        take(c * kStrips + strip, part, words);
                        multiply_split(sum[0][strip], sum[1][strip], words, first, second);
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ void multiply_split(float (&large)[4], float (&small)[4], const uint32_t (&w)[4],
                                                          uint32_t first, uint32_t second) {
        uint32_t high[4], low[4], first_high, first_low, second_high, second_low;
#pragma unroll
        for (int k = 0; k < 4; k++) split_tf32(w[k], high[k], low[k]);
        split_tf32(first, first_high, first_low);
        split_tf32(second, second_high, second_low);
        multiply_tf32(small, low, first_high, second_high);
        multiply_tf32(small, high, first_low, second_low);
        multiply_tf32(large, high, first_high, second_high);
    }

    // All warps come here.
    __device__ __forceinline__ RowArrival<kStrips> receive(int buffer) const {
        const char* const message = vector(buffer) + place.lane % Tile::kBlocks * Tile::kMessage;
        const float2 shares =
            reinterpret_cast<const float2*>(message + Tile::kChunks * Tile::kChunkBytes)[place.warp];
        float sum[2][kStrips][4] = {};
        multiply(buffer, sum);
        const int group = place.lane / 4, t = place.lane % 4;
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                sums(quarter(), 2 * t + k % 2)[(half() * kStrips + strip) * 16 + k / 2 * 8 + group] =
                    sum[0][strip][k] + sum[1][strip][k];
        RowArrival<kStrips> arrival;
        arrival.first_sum = sum_lanes<Tile::kBlocks>(shares.x);
        arrival.second_sum = sum_lanes<Tile::kBlocks>(shares.y);
        __syncthreads();
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++) {
            const int column = 32 * strip + place.lane;
            arrival.product[strip] = (sums(0, place.warp)[column] + sums(1, place.warp)[column]) +
                                     (sums(2, place.warp)[column] + sums(3, place.warp)[column]);
        }
        return arrival;
    }

    // All warps come here.
    __device__ __forceinline__ void depart(const RowDeparture<kStrips>& own, int buffer) const {
        char* const message = outbox(buffer);
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++) {
            if constexpr (Tile::kHalf) {
                const int slot = (strip * kTensorRows + place.warp) * 32 + place.lane;
                reinterpret_cast<__nv_bfloat16*>(message)[slot] = __float2bfloat16_rn(own.value[strip]);
            } else {
                const int chunk = 2 * strip + place.lane / 16;
                const int slot = (chunk * kTensorRows + place.warp) * 16 + place.lane % 16;
                reinterpret_cast<float*>(message)[slot] = own.value[strip];
            }
        }
        const float first = sum_lanes<32>(own.first), second = sum_lanes<32>(own.second);
        if (place.lane == 0)
            reinterpret_cast<float2*>(message + Tile::kChunks * Tile::kChunkBytes)[place.warp] = {first, second};
        fence_copies();
        __syncthreads();
        if (place.lane == 0 && place.warp < Tile::kBlocks) {
            const int peer = (place.warp + place.rank) % Tile::kBlocks;  // not all to the same one at once
            copy(remote_address(vector(buffer) + place.rank * Tile::kMessage, peer), message, Tile::kMessage,
                 remote_address(barrier(buffer), peer));
        }
    }
};

#endif

// Grid: blocks of a cluster times clusters; cluster c takes rows 8 c and on.
template <class Tile, class Step>
__global__ void __launch_bounds__(kTensorThreads, 1)
    sweep_tensor_kernel(const typename Step::Arguments args, int* const timeout) {
#ifdef NEWLLM_CLUSTERS
    const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int width = static_cast<int>(args.sweep.width), tokens = static_cast<int>(args.sweep.span.tokens);
    TensorSweeper<Tile> sweeper{{warp, lane, rank, rank * Tile::kColumns + lane, width,
                                 int64_t(blockIdx.x / Tile::kBlocks) * kTensorRows + warp}};
    if (threadIdx.x == 0)
        for (int b = 0; b < 2; b++) {
            barrier_init(sweeper.barrier(b));
            barrier_expect(sweeper.barrier(b), Tile::kVector);
        }
    Step step;
    step.begin(args, sweeper);
    sweeper.template load_weights<Step>(args.sweep.weight);
    cluster_sync();

    sweeper.depart(step.departure(), 0);
    bool alive = true;
    for (int token = 0; token < tokens; token++) {
        const bool more = token + 1 < tokens;
        step.fetch(args, sweeper.place, more);
        uint64_t* const barrier = sweeper.barrier(token & 1);
        // After a wait that was given up nothing is waited for, so that all come to the end.
        alive = alive && __all_sync(~0u, barrier_wait(barrier, (token >> 1) & 1));
        if (threadIdx.x == 0 && alive) barrier_expect(barrier, Tile::kVector);
        step.arrive(args, sweeper.place, sweeper.receive(token & 1), more);
        if (more) sweeper.depart(step.departure(), ~token & 1);
    }
    step.finish(args, sweeper.place);
    if (!alive && lane == 0) give_up(timeout);
    cluster_sync();
#endif
}

}  // namespace newllm
