// The skeleton of a sweep of many rows on thread-block clusters and tensor cores: one exchange a token.
//
// A cluster sweeps eight rows with bfloat16 weights, and each of its blocks makes kColumns columns of their vectors,
// which travel in bfloat16. The warps of a block share the products: two halves of its columns by four quarters of the
// arriving vector, with W in registers (and where these do not suffice in shared memory). A block begins with its own
// part of the vector and takes those of the others in the order in which they were sent, so that the products go on
// while the rest travels; a quarter is half of every other part. Then warp w has row w: it adds the quarters' sums up,
// makes the row's columns of the next vector (`Step`, forward or adjoint) and its share of two float32 sums over the
// columns, and the block copies them to every other block of the cluster.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

#include "cuda_cluster.cuh"
#include "cuda_tensor.cuh"

namespace newllm {

constexpr int kTensorRows = 8;
constexpr int kTensorThreads = 32 * kTensorRows;

// Strips: of 32 columns, of a block. Resident: how many of a warp's kTiles pieces of W (16 x 16) are in registers.
template <int Strips, int Blocks, int Resident>
struct TensorTile {
    static constexpr int kStrips = Strips, kBlocks = Blocks, kResident = Resident;
    static constexpr int kColumns = 32 * Strips;
    static constexpr int kVisits = Blocks / 2;               // blocks whose parts a warp takes half of
    static constexpr int kTiles = kVisits * Strips * Strips;  // by visit, band of 16 arriving columns, strip
    static constexpr int kRunBytes = 64 * kTensorRows;        // 32 columns of every row, one row after the other
    static constexpr int kMessage = Strips * kRunBytes + kTensorRows * sizeof(float2);
    static constexpr int kVector = Blocks * kMessage;  // bytes
    static constexpr int kStride = kColumns + 4;       // of the quarters' sums; keeps lanes on different banks
    static_assert((Blocks == 4 || Blocks == 8) && Resident <= kTiles, "");
};

// Where things lie in a block's shared memory, in bytes.
template <class Tile>
struct TensorLayout {
    static constexpr size_t sums = 2 * Tile::kVector;
    static constexpr size_t weights = sums + 4 * kTensorRows * Tile::kStride * sizeof(float);
    static constexpr size_t barriers = weights + (Tile::kTiles - Tile::kResident) * sizeof(uint4) * kTensorThreads;
    static constexpr size_t total = barriers + 2 * Tile::kBlocks * sizeof(uint64_t);
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
    static constexpr int kStrips = Tile::kStrips, kBlocks = Tile::kBlocks;

    const RowPlace place;
    bool alive;  // no wait has been given up; after that nothing is waited for, so that all come to the end
    uint32_t weight[Tile::kResident][4];

    // A part of a vector: the block's own is 0, and d that of the block which is d before it.
    static __device__ __forceinline__ char* part(int buffer, int distance) {
        return dynamic_shared() + buffer * Tile::kVector + distance * Tile::kMessage;
    }
    static __device__ __forceinline__ uint64_t* barrier(int buffer, int distance) {
        return reinterpret_cast<uint64_t*>(dynamic_shared() + Layout::barriers) + buffer * kBlocks + distance;
    }
    static __device__ __forceinline__ float2* row_sums(char* part) {
        return reinterpret_cast<float2*>(part + kStrips * Tile::kRunBytes);
    }
    // [quarter, row, column] of the block.
    static __device__ __forceinline__ float* sums(int quarter, int row) {
        return reinterpret_cast<float*>(dynamic_shared() + Layout::sums) +
               (quarter * kTensorRows + row) * Tile::kStride;
    }
    static __device__ __forceinline__ uint4* stored(int tile) {
        return reinterpret_cast<uint4*>(dynamic_shared() + Layout::weights) +
               (tile - Tile::kResident) * kTensorThreads + threadIdx.x;
    }
    __device__ __forceinline__ int half() const { return place.warp % 2; }
    __device__ __forceinline__ int quarter() const { return place.warp / 2; }
    // Of a visit, and the first of the bands there that are the warp's.
    __device__ __forceinline__ int distance(int visit) const { return 2 * visit + quarter() / 2; }
    __device__ __forceinline__ int first_band() const { return quarter() % 2 * kStrips; }

    static __device__ __forceinline__ float load(const void* matrix, int index) {
        return __bfloat162float(static_cast<const __nv_bfloat16*>(matrix)[index]);
    }

    // A lane's entry of W's piece: by row of the piece (lower or upper half) and by which of its four columns.
    template <class Step>
    __device__ __forceinline__ uint32_t load_entry(const void* matrix, int tile, int upper, int i) const {
        const int group = place.lane / 4, t = place.lane % 4, width = place.width;
        const int visit = tile / (kStrips * kStrips), strip = tile % kStrips;
        const int band = first_band() + tile / kStrips % kStrips;
        const int source = (place.rank + kBlocks - distance(visit)) % kBlocks;
        const int to = place.rank * Tile::kColumns + (half() * kStrips + strip) * 16 + upper * 8 + group;
        const int from = source * Tile::kColumns + band / 2 * 32 + 8 * t + band % 2 * 4 + i;
        if (to >= width || from >= width) return 0;
        return static_cast<const uint16_t*>(matrix)[Step::index(width, to, from)];
    }

    template <class Step>
    __device__ __forceinline__ void load_tile(const void* matrix, int tile, uint32_t (&words)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t even = load_entry<Step>(matrix, tile, k % 2, k / 2 * 2);
            words[k] = even | load_entry<Step>(matrix, tile, k % 2, k / 2 * 2 + 1) << 16;
        }
    }

    template <class Step>
    __device__ __forceinline__ void load_weights(const void* matrix) {
#pragma unroll
        for (int tile = 0; tile < Tile::kResident; tile++) load_tile<Step>(matrix, tile, weight[tile]);
        for (int tile = Tile::kResident; tile < Tile::kTiles; tile++) {
            uint32_t words[4];
            load_tile<Step>(matrix, tile, words);
            *stored(tile) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    // A piece of W.
    __device__ __forceinline__ void take(int tile, uint32_t (&words)[4]) const {
        if (tile < Tile::kResident) {
#pragma unroll
            for (int k = 0; k < 4; k++) words[k] = weight[tile < Tile::kResident ? tile : 0][k];
        } else {
            const uint4 loaded = *stored(tile);
            words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
        }
    }

    // For the part from that distance.
    __device__ __forceinline__ void wait(int buffer, int distance, int parity) {
        const bool came = distance == 0 || !alive || barrier_wait(barrier(buffer, distance), parity);
        alive = __all_sync(~0u, came) && alive;
    }

    // The warp's half of W's rows times its half of one part of the vectors.
    __device__ __forceinline__ void multiply(const char* part, int visit, float (&sum)[2][kStrips][4]) const {
        const char* const mine = part + place.lane * sizeof(uint4);
#pragma unroll
        for (int k = 0; k < kStrips; k++) {
            const int band = first_band() + k;
            const uint2 x = *reinterpret_cast<const uint2*>(mine + band / 2 * Tile::kRunBytes + band % 2 * sizeof(uint2));
#pragma unroll
            for (int strip = 0; strip < kStrips; strip++) {
                uint32_t words[4];
                take((visit * kStrips + k) * kStrips + strip, words);
                multiply_bfloat16(sum[k % 2][strip], words, x.x, x.y);
            }
        }
    }

    // All warps come here.
    __device__ __forceinline__ RowArrival<kStrips> receive(int buffer, int parity) {
        float sum[2][kStrips][4] = {};
#pragma unroll
        for (int visit = 0; visit < Tile::kVisits; visit++) {
            wait(buffer, distance(visit), parity);
            multiply(part(buffer, distance(visit)), visit, sum);
        }
        // What this warp has not waited for other warps have, or it has come by now.
        const int distance = place.lane % kBlocks;
        wait(buffer, distance, parity);
        const float2 shares = row_sums(part(buffer, distance))[place.warp];
        RowArrival<kStrips> arrival;
        arrival.first_sum = sum_lanes<kBlocks>(shares.x);
        arrival.second_sum = sum_lanes<kBlocks>(shares.y);
        const int group = place.lane / 4, t = place.lane % 4;
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                sums(quarter(), 2 * t + k % 2)[(half() * kStrips + strip) * 16 + k / 2 * 8 + group] =
                    sum[0][strip][k] + sum[1][strip][k];
        __syncthreads();
        if (threadIdx.x > 0 && threadIdx.x < kBlocks && alive)
            barrier_expect(barrier(buffer, threadIdx.x), Tile::kMessage);
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
        char* const message = part(buffer, 0);
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++)
            reinterpret_cast<__nv_bfloat16*>(message)[(strip * kTensorRows + place.warp) * 32 + place.lane] =
                __float2bfloat16_rn(own.value[strip]);
        const float first = sum_lanes<32>(own.first), second = sum_lanes<32>(own.second);
        if (place.lane == 0) row_sums(message)[place.warp] = {first, second};
        fence_copies();
        __syncthreads();
        if (place.lane == 0 && place.warp > 0 && place.warp < kBlocks) {
            const int peer = (place.rank + place.warp) % kBlocks;
            copy(remote_address(part(buffer, place.warp), peer), message, Tile::kMessage,
                 remote_address(barrier(buffer, place.warp), peer));
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
                                 int64_t(blockIdx.x / Tile::kBlocks) * kTensorRows + warp},
                                true};
    const bool arms = threadIdx.x < 2 * Tile::kBlocks;
    if (arms) barrier_init(sweeper.barrier(0, threadIdx.x));
    __syncwarp();
    if (arms) barrier_expect(sweeper.barrier(0, threadIdx.x), Tile::kMessage);
    Step step;
    step.begin(args, sweeper);
    sweeper.template load_weights<Step>(args.sweep.weight);
    cluster_sync();

    sweeper.depart(step.departure(), 0);
    for (int token = 0; token < tokens; token++) {
        const bool more = token + 1 < tokens;
        step.fetch(args, sweeper.place, more);
        step.arrive(args, sweeper.place, sweeper.receive(token & 1, (token >> 1) & 1), more);
        if (more) sweeper.depart(step.departure(), ~token & 1);
    }
    step.finish(args, sweeper.place);
    leave(sweeper.alive, timeout);
#endif
}

}  // namespace newllm
