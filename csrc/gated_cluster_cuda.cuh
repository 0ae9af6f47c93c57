// The gated cell on thread-block clusters, one hidden layer: all matrices in bfloat16 in registers and shared memory,
// two exchanges a token.
//
// A block of the cluster makes kColumns columns of both vectors that travel, the context's and the hidden layer's, and
// each of its warps takes the products with kReach arriving columns on tensor cores. So that float32 vectors lose next
// to nothing there, a number is the sum of two in bfloat16, which are two columns of what is multiplied; eight columns
// serve one row or four. The warps' parts are added up, and the block sends what it makes of them to all blocks.
// Two buffers suffice, one a vector: nobody can send one before it has received the other from everybody.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

#include "context_arguments_cuda.cuh"
#include "context_cell.h"
#include "cuda_cluster.cuh"
#include "cuda_lanes.cuh"
#include "cuda_tensor.cuh"

namespace newllm {

constexpr int kGatedWarps = 8;
constexpr int kGatedThreads = 32 * kGatedWarps;
constexpr int kMostGatedBlocks = 16;
constexpr int kGatedColumns = 48;  // of a block
constexpr int kTiles = kGatedColumns / 16;  // of 16 columns, of a block
constexpr int kSources = kMostGatedBlocks / kGatedWarps;  // blocks whose columns a warp takes of what arrives
constexpr int kReach = kSources * kGatedColumns;          // columns of those
constexpr int kStrips = 1 + kGates;   // matrices: of the context to the hidden layer, and of that to each gate
constexpr int kPieces = kTiles * kReach / 16;  // 16 x 16, of a strip, of a warp
// Four lanes for each of the block's columns make it.
constexpr int kMakers = 4 * kGatedColumns, kMakerWarps = kMakers / 32;

// Rows: of a cluster, 1 or 4. Resident: how many of a warp's pieces of the matrices are in registers.
template <int Rows, bool Adjoint, int Resident>
struct GatedTile {
    static constexpr int kRows = Rows, kResident = Resident;
    static constexpr bool kAdjoint = Adjoint;
    static constexpr int kStored = kStrips * kPieces - Resident;
    static constexpr int kSlots = Adjoint ? 1 + kGates : 1;  // numbers that a warp keeps of each of its columns
    static constexpr int kRowStride = kSlots * kReach + 8;   // keeps rows on different banks, as the 4 below does
    // Of the warps' parts, four of every column: rows, or one row four times.
    static constexpr int kStripStride = 4 * kGatedColumns;
    static constexpr int kPartStride = (Adjoint ? 1 : kGates) * kStripStride + 4;
    static constexpr int kShare = kReach * Rows / 32;  // a lane's numbers of those that arrive for its warp
    // Quads of a row of a message: columns alone, and columns with every maker warp's two sums over its own.
    static constexpr int kPlain = kGatedColumns / 4, kSummed = (kGatedColumns + 2 * kMakerWarps) / 4;
    static_assert(Rows == 1 || Rows == 4, "");
};

// Where things lie in a block's shared memory, in bytes.
template <class Tile>
struct GatedLayout {
    static constexpr size_t vector = size_t(kMostGatedBlocks) * Tile::kRows * Tile::kSummed * sizeof(float4);
    static constexpr size_t outbox = 2 * vector;
    static constexpr size_t slots = outbox + Tile::kRows * Tile::kSummed * sizeof(float4);
    static constexpr size_t parts = slots + kGatedWarps * Tile::kRows * Tile::kRowStride * sizeof(float);
    static constexpr size_t own = parts + kGatedWarps * Tile::kPartStride * sizeof(float);
    static constexpr size_t weights = own + kGatedColumns * Tile::kRows * sizeof(float);
    static constexpr size_t barriers = weights + size_t(Tile::kStored) * sizeof(uint4) * kGatedThreads;
    static constexpr size_t total = barriers + 2 * sizeof(uint64_t);
};

#ifdef NEWLLM_CLUSTERS

// The two vectors, by buffer.
enum GatedVector { kHiddenVector, kContextVector };

// A number as the sum of two in bfloat16, the larger one above.
__device__ __forceinline__ uint32_t split(float x) {
    const float upper = __uint_as_float(pack_bfloat16(0.0f, x));
    return pack_bfloat16(x - upper, upper);
}

template <class Tile, class Sweep>
struct GatedMember {
    static constexpr int kRows = Tile::kRows;
    using Layout = GatedLayout<Tile>;
    using Sums = float[kTiles][4];

    const Sweep& sweep;
    const int width, hidden, rank, warp, lane;
    const int64_t first_row;
    const float share;  // one over the width
    const bool exists;  // the lane's row
    bool alive = true;  // no wait was given up; after that nothing is waited for, so that all come to the end
    uint32_t weight[Tile::kResident][4];

    __device__ __forceinline__ explicit GatedMember(const Sweep& sweep)
        : sweep(sweep), width(static_cast<int>(sweep.width)), hidden(static_cast<int>(sweep.hidden)),
          rank(cluster_rank()), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          first_row(int64_t(blockIdx.x / cluster_size()) * kRows), share(1.0f / width),
          exists(first_row + row() < runs(sweep.span)) {}

    template <class Value>
    static __device__ __forceinline__ Value* at(size_t place) {
        return reinterpret_cast<Value*>(dynamic_shared() + place);
    }
    static __device__ __forceinline__ float* vector(int which) { return at<float>(which * Layout::vector); }
    static __device__ __forceinline__ float* outbox() { return at<float>(Layout::outbox); }
    static __device__ __forceinline__ uint64_t* barrier(int which) { return at<uint64_t>(Layout::barriers) + which; }
    // Of the block's own columns, what their makers will need of the exchange before.
    static __device__ __forceinline__ float& own(int output, int row) {
        return at<float>(Layout::own)[output * kRows + row];
    }
    static __device__ __forceinline__ int quads(int which) {
        return which == kHiddenVector ? Tile::kPlain : Tile::kSummed;
    }

    // The lane's row of the cluster's, as a maker and of what arrives.
    __device__ __forceinline__ int row() const { return lane % kRows; }
    // As a maker: the column of the block, and whether it is the one lane to write it.
    __device__ __forceinline__ bool makes() const { return threadIdx.x < kMakers; }
    __device__ __forceinline__ int output() const { return threadIdx.x / 4; }
    __device__ __forceinline__ int column() const { return rank * kGatedColumns + output(); }
    __device__ __forceinline__ bool writes() const { return lane % 4 < kRows; }
    // Of what arrives: the lane's i-th number, by column of the warp's, and of all.
    __device__ __forceinline__ int local(int i) const { return lane / kRows + 32 / kRows * i; }
    __device__ __forceinline__ int arriving(int i) const { return warp * kReach + local(i); }
    __device__ __forceinline__ bool owns(int column) const {
        return unsigned(column - rank * kGatedColumns) < unsigned(kGatedColumns);
    }
    __device__ __forceinline__ float* slot(int row, int which) const {
        return at<float>(Layout::slots) + (warp * kRows + row) * Tile::kRowStride + which * kReach;
    }

    // A lane's words of one piece. Strip 0 is weight_c, the others the gates; adjoint all are transposed.
    __device__ __forceinline__ uint4 load_piece(int strip, int piece) const {
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int to = rank * kGatedColumns + piece % kTiles * 16 + i / 2 % 2 * 8 + lane / 4;
            const int from = warp * kReach + piece / kTiles * 16 + lane % 4 * 4 + i / 4 * 2 + i % 2;
            const bool to_context = Tile::kAdjoint == (strip == 0);
            const int context = to_context ? to : from, inner = to_context ? from : to;
            if (context >= width || inner >= hidden) continue;
            const auto* const matrix = static_cast<const uint16_t*>(strip == 0 ? sweep.weight_c : sweep.weight_gate);
            const int entry = strip == 0 ? inner * width + context : ((strip - 1) * width + context) * hidden + inner;
            words[i / 2] |= uint32_t(matrix[entry]) << i % 2 * 16;
        }
        return {words[0], words[1], words[2], words[3]};
    }

    // Pieces before this one that are in registers, over which these are spread evenly; and whether this one is.
    static constexpr __device__ int resident(int piece) { return piece * Tile::kResident / (kStrips * kPieces); }
    static constexpr __device__ bool resides(int piece) { return resident(piece) < resident(piece + 1); }
    static __device__ __forceinline__ uint4& stored(int piece) {
        return at<uint4>(Layout::weights)[(piece - resident(piece)) * kGatedThreads + threadIdx.x];
    }

    __device__ __forceinline__ void load_weights() {
#pragma unroll 1
        for (int piece = 0; piece < kStrips * kPieces; piece++)
            if (!resides(piece)) stored(piece) = load_piece(piece / kPieces, piece % kPieces);
#pragma unroll
        for (int piece = 0; piece < kStrips * kPieces; piece++) {
            if (!resides(piece)) continue;
            const uint4 words = load_piece(piece / kPieces, piece % kPieces);
            uint32_t* const held = weight[resident(piece)];
            held[0] = words.x, held[1] = words.y, held[2] = words.z, held[3] = words.w;
        }
    }

    // Adds a strip's products; quad(band): four neighbours of the lane's row, split, of sixteen that arrived.
    template <class Quad>
    __device__ __forceinline__ void multiply(int strip, Quad quad, Sums& sums) const {
        const uint32_t half = lane / 4 % 2 ? 0x5410 : 0x7632;
#pragma unroll
        for (int band = 0; band < kReach / 16; band++) {
            const uint4 x = quad(band);
            const uint32_t first = __byte_perm(x.x, x.y, half), second = __byte_perm(x.z, x.w, half);
#pragma unroll
            for (int m = 0; m < kTiles; m++) {
                const int piece = strip * kPieces + band * kTiles + m;
                if (resides(piece)) {
                    multiply_bfloat16(sums[m], weight[resident(piece)], first, second);
                } else {
                    const uint4 words = stored(piece);
                    const uint32_t fetched[4] = {words.x, words.y, words.z, words.w};
                    multiply_bfloat16(sums[m], fetched, first, second);
                }
            }
        }
    }
    // What the warp put into its slots, and what arrived as it is to be multiplied.
    __device__ __forceinline__ void multiply_slot(int strip, int which, Sums& sums) const {
        const float* const from = slot(kRows == 1 ? 0 : lane / 8, which) + lane % 4 * 4;
        multiply(strip, [&](int band) { return reinterpret_cast<const uint4*>(from)[band * 4]; }, sums);
    }
    __device__ __forceinline__ void multiply_hidden(int strip, Sums& sums) const {
        const float* const from = vector(kHiddenVector) + lane % 4 * 4;
        const int row = kRows == 1 ? 0 : lane / 8;
        const auto quad = [&](int band) {
            const int block = warp * kSources + band / kTiles;
            const float* const message = from + (block * kRows + row) * kGatedColumns;
            return reinterpret_cast<const uint4*>(message)[band % kTiles * 4];
        };
        multiply(strip, quad, sums);
    }

    // [warp, strip, column, row or repetition]
    __device__ __forceinline__ void put_part(int strip, const Sums& sums) const {
        float* const parts = at<float>(Layout::parts) + warp * Tile::kPartStride + strip * Tile::kStripStride;
#pragma unroll
        for (int m = 0; m < kTiles; m++)
#pragma unroll
            for (int upper = 0; upper < 2; upper++)
                parts[(m * 2 + upper) * 32 + lane] = sums[m][2 * upper] + sums[m][2 * upper + 1];
    }
    // By makers: the sum of the warps' parts, of the lane's column and row.
    __device__ __forceinline__ float take_parts(int strip) const {
        constexpr int each = kRows == 1 ? kGatedWarps / 4 : kGatedWarps;
        const float* const parts = at<float>(Layout::parts) + strip * Tile::kStripStride + threadIdx.x;
        const int from = kRows == 1 ? lane % 4 * each : 0;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < each; w++) sum += parts[(from + w) * Tile::kPartStride];
#pragma unroll
        for (int mask = kRows; mask < 4; mask <<= 1) sum += __shfl_xor_sync(~0u, sum, mask);
        return sum;
    }

    // By makers: their column into the block's message.
    __device__ __forceinline__ void post_hidden(float value) const {
        if (writes()) outbox()[row() * Tile::kPlain * 4 + output()] = __uint_as_float(split(value));
    }
    // The same with what it adds to the two sums.
    __device__ __forceinline__ void post_context(float value, float first, float second) const {
        float* const message = outbox() + row() * Tile::kSummed * 4;
        if (writes()) message[output()] = value;
#pragma unroll
        for (int mask = 4; mask < 32; mask <<= 1) {
            first += __shfl_xor_sync(~0u, first, mask);
            second += __shfl_xor_sync(~0u, second, mask);
        }
        if (lane < kRows)
            reinterpret_cast<float2*>(message + kGatedColumns)[warp] = make_float2(first, second);
    }
    // The makers' message to all blocks. All of the block come here.
    __device__ __forceinline__ void depart(int which) const {
        __syncthreads();
        const auto message = at<float4>(Layout::outbox);
        const auto to = reinterpret_cast<float4*>(vector(which));
        constexpr int threads = kGatedThreads, most = kMostGatedBlocks;
        if (which == kHiddenVector) broadcast<kRows * Tile::kPlain, threads, most>(to, message, barrier(which));
        else broadcast<kRows * Tile::kSummed, threads, most>(to, message, barrier(which));
    }

    __device__ __forceinline__ void expect(int which) const {
        barrier_expect(barrier(which), cluster_size() * kRows * quads(which) * sizeof(float4));
    }
    // The count-th arrival of a vector.
    __device__ __forceinline__ void await(int which, int64_t count) {
        alive = alive && __all_sync(~0u, barrier_wait(barrier(which), count & 1));
        if (threadIdx.x == 0 && alive) expect(which);
    }

    // A context vector's number in column k, of the lane's row.
    __device__ __forceinline__ float arrived(int k) const {
        return vector(kContextVector)[(k / kGatedColumns * kRows + row()) * Tile::kSummed * 4 + k % kGatedColumns];
    }
    // Its two sums, of the lane's row.
    __device__ __forceinline__ float2 arrived_sums() const {
        float sums[2 * kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            float2 sum = {0.0f, 0.0f};
#pragma unroll
            for (int i = lane; i < kMostGatedBlocks * kMakerWarps; i += 32) {
                const float* const message =
                    vector(kContextVector) + (i / kMakerWarps * kRows + r) * Tile::kSummed * 4 + kGatedColumns;
                const float2 part = reinterpret_cast<const float2*>(message)[i % kMakerWarps];
                sum.x += part.x, sum.y += part.y;
            }
            sums[2 * r] = sum.x, sums[2 * r + 1] = sum.y;
        }
        if constexpr (kRows == 1) {
#pragma unroll
            for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
                for (float& sum : sums) sum += __shfl_xor_sync(~0u, sum, mask);
            return {sums[0], sums[1]};
        } else {
            const float total = sum_of_lanes<2 * kRows>(sums, lane);
            constexpr int apart = 32 / (2 * kRows);
            const int source = 2 * row() * apart;
            return {__shfl_sync(~0u, total, source), __shfl_sync(~0u, total, source + apart)};
        }
    }

    // Empties the block's memory, arms the barriers, loads the matrices. No message may be sent before cluster_sync.
    __device__ __forceinline__ void begin() {
        for (int i = threadIdx.x; i < int(Layout::weights / sizeof(float)); i += kGatedThreads) at<float>(0)[i] = 0.0f;
        if (threadIdx.x == 0)
            for (int which : {kHiddenVector, kContextVector}) {
                barrier_init(barrier(which));
                expect(which);
            }
        load_weights();
        __syncthreads();
    }
};

#endif

}  // namespace newllm
