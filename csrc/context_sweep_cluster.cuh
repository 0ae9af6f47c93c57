// The skeleton of a sweep of one or a few matrices in turn on thread-block clusters: W in registers and, as far as
// these do not suffice, in shared memory; one exchange a stage, that is a token's layer.
//
// A cluster sweeps a few runs (rows) of tokens, four of them or one at a time (a group; groups take turns, so that one
// computes while the messages of another travel). Every warp of the cluster owns kColumns columns of the vector that
// travels. An exchange: a warp reads the whole vector from its block's shared memory, takes the products with its rows
// of W, and makes of them its own columns of the next vector (`Step`, forward or adjoint) and its share of two sums
// over the columns (the layer norm's). The block gathers these and sends them to every block of the cluster, in runs,
// which travel faster than single messages. No block waits for another but by the vector's arrival; two buffers
// suffice, because nobody can send a vector before it has received the last one from everybody.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <type_traits>

#include "cuda_cluster.cuh"
#include "cuda_lanes.cuh"

namespace newllm {

constexpr int kSweepWarps = 8;
constexpr int kSweepThreads = 32 * kSweepWarps;

// Columns: of one warp. Senders: the cluster has at most 32 * Senders warps. W is cut into a share for every warp that
// sends and every one that receives; a lane holds Senders of them, Resident in registers, the others in shared memory,
// where Half keeps them in bfloat16. Rows: of a group, 1 or 4. Layers: matrices, each of which is held so.
template <int Columns, int Senders, int Resident, int Rows, int Layers, bool Half>
struct SweepTile {
    static constexpr int kColumns = Columns, kSenders = Senders, kResident = Resident, kRows = Rows, kLayers = Layers;
    static constexpr bool kHalf = Half;
    using Quad = std::conditional_t<Half, uint2, float4>;  // four stored entries of W
    static constexpr int kStored = Senders - Resident;
    static constexpr int kQuads = (Columns + 2 + 3) / 4;  // of a warp's message: columns and two sums
    static constexpr int kMessage = Rows * kQuads * kSweepWarps;  // quads that a block sends to another
    static constexpr int kVector = 4 * Senders * kMessage;        // quads of a group's vector
    static constexpr bool kSumsAsColumns = Columns + 2 <= 8;  // they are reduced together with the products
    static constexpr int kValues = kSumsAsColumns ? Columns + 2 : Columns;
    static constexpr int kRowValues = Rows * kValues < 8 ? 8 : Rows * kValues;
    static constexpr int kShareQuads = Columns * Columns / 4;
    static_assert((Columns == 6 || Columns == 8) && Resident <= Senders && (Rows == 1 || Rows == 4), "");
};

// Where things lie in a block's shared memory, in bytes.
struct SweepLayout {
    size_t outbox, weights, state, barriers, total;
};

template <class Tile, class Step>
__host__ __device__ inline SweepLayout sweep_layout(int groups) {
    SweepLayout at{};
    at.outbox = size_t(2) * groups * Tile::kVector * sizeof(float4);
    at.weights = at.outbox + 2 * Tile::kMessage * sizeof(float4);
    at.state = at.weights +
               Tile::kLayers * Tile::kStored * Tile::kShareQuads * sizeof(typename Tile::Quad) * kSweepThreads;
    at.barriers = at.state + (groups > 1 ? groups * sizeof(typename Step::State) * kSweepThreads : 0);
    at.total = at.barriers + 2 * groups * sizeof(uint64_t);
    return at;
}

// Bits of a lane's number: below are rows (and lanes that hold the same), above is one of eight columns.
constexpr int kColumnShift = 2;

// What a lane is responsible for: one column of one row of the group. Lanes of one column and row hold the same.
struct Place {
    int worker, lane;   // warp of the cluster, lane of the warp
    int first, column;  // the warp's first column, the lane's
    int output;         // column - first
    int row;            // within the group
    bool sends;         // is the one lane to put the column into the warp's message
    bool owns, writes;  // has a column of the vector; and is the one lane to write it
};

// What a vector's arrival gives a lane, and what the lane gives to the next.
struct Arrival {
    float product, first_sum, second_sum;
};
struct Departure {
    float value, first, second;  // the column, and what it adds to the two sums
};

#ifdef NEWLLM_CLUSTERS

// Sums over all lanes of the values, rows by Tile::kValues, of which a lane gets one: of its row, of its column.
template <class Tile>
__device__ __forceinline__ float reduce_values(float (&values)[Tile::kRowValues], int lane) {
    constexpr int count = Tile::kValues;
    if constexpr (Tile::kRows == 4) {
        halve<2 * count>(values, 2, lane);
        halve<count>(values, 1, lane);
#pragma unroll
        for (int j = count; j < 8; j++) values[j] = 0.0f;
    }
    halve<4>(values, 16, lane);
    halve<2>(values, 8, lane);
    halve<1>(values, 4, lane);
#pragma unroll
    for (int mask = Tile::kRows; mask < 4; mask <<= 1) values[0] += __shfl_xor_sync(~0u, values[0], mask);
    return values[0];
}

// The sum over all lanes, of the lane's own row.
template <int rows>
__device__ __forceinline__ float reduce_rows(float (&sums)[rows], int lane) {
    if constexpr (rows == 4) {
        halve<2>(sums, 2, lane);
        halve<1>(sums, 1, lane);
    }
#pragma unroll
    for (int mask = rows; mask < 32; mask <<= 1) sums[0] += __shfl_xor_sync(~0u, sums[0], mask);
    return sums[0];
}

template <bool half>
__device__ __forceinline__ float load_weight(const void* weight, int index) {
    if constexpr (half) return __bfloat162float(static_cast<const __nv_bfloat16*>(weight)[index]);
    return static_cast<const float*>(weight)[index];
}

__device__ __forceinline__ void pack(const float* entries, float4& quad) {
    quad = make_float4(entries[0], entries[1], entries[2], entries[3]);
}
__device__ __forceinline__ void unpack(const float4& quad, float* entries) {
    entries[0] = quad.x, entries[1] = quad.y, entries[2] = quad.z, entries[3] = quad.w;
}
// Numbers that bfloat16 holds exactly.
__device__ __forceinline__ void pack(const float* entries, uint2& quad) {
    quad.x = __float_as_uint(entries[0]) >> 16 | __float_as_uint(entries[1]);
    quad.y = __float_as_uint(entries[2]) >> 16 | __float_as_uint(entries[3]);
}
__device__ __forceinline__ void unpack(const uint2& quad, float* entries) {
    constexpr uint32_t upper = 0xffff0000u;
    entries[0] = __uint_as_float(quad.x << 16), entries[1] = __uint_as_float(quad.x & upper);
    entries[2] = __uint_as_float(quad.y << 16), entries[3] = __uint_as_float(quad.y & upper);
}

template <class Tile, class Step>
struct Sweeper {
    using Quad = typename Tile::Quad;
    using Weights = float[Tile::kColumns][Tile::kColumns];  // by column that is made, by column that arrived

    const Place place;
    const int width;
    float weight[Tile::kLayers][Tile::kResident][Tile::kColumns][Tile::kColumns];

    static __device__ __forceinline__ float4* vector(int buffer) {
        return reinterpret_cast<float4*>(dynamic_shared()) + buffer * Tile::kVector;
    }
    // Where a warp of the cluster has a quad of a row's message, in a vector.
    static __device__ __forceinline__ int slot(int worker, int row, int quad) {
        return worker / kSweepWarps * Tile::kMessage + (row * Tile::kQuads + quad) * kSweepWarps + worker % kSweepWarps;
    }
    static __device__ __forceinline__ Quad* share(const SweepLayout& at, int layer, int p) {
        return reinterpret_cast<Quad*>(dynamic_shared() + at.weights) +
               (layer * Tile::kStored + p - Tile::kResident) * Tile::kShareQuads * kSweepThreads + threadIdx.x;
    }
    __device__ __forceinline__ int arriving(int p, int i) const { return (p * 32 + place.lane) * Tile::kColumns + i; }

    template <bool half>
    __device__ __forceinline__ void load_share(const void* matrices, int layer, int p, Weights& w) const {
#pragma unroll
        for (int j = 0; j < Tile::kColumns; j++)
#pragma unroll
            for (int i = 0; i < Tile::kColumns; i++) {
                const int to = place.first + j, from = arriving(p, i), last = width - 1;
                const int entry = layer * width * width + Step::index(width, min(to, last), min(from, last));
                const float value = load_weight<half>(matrices, entry);
                w[j][i] = max(to, from) < width ? value : 0.0f;
            }
    }

    template <bool half>
    __device__ __forceinline__ void load_weights(const SweepLayout& at, const void* matrices) {
#pragma unroll
        for (int layer = 0; layer < Tile::kLayers; layer++) {
#pragma unroll
            for (int p = 0; p < Tile::kResident; p++) load_share<half>(matrices, layer, p, weight[layer][p]);
            for (int p = Tile::kResident; p < Tile::kSenders; p++) {
                Weights w;
                load_share<half>(matrices, layer, p, w);
                store_share(at, layer, p, w);
            }
        }
    }

    static __device__ __forceinline__ void store_share(const SweepLayout& at, int layer, int p, const Weights& w) {
#pragma unroll
        for (int q = 0; q < Tile::kShareQuads; q++) pack(&w[0][0] + 4 * q, share(at, layer, p)[q * kSweepThreads]);
    }

    static __device__ __forceinline__ void fetch_share(const SweepLayout& at, int layer, int p, Weights& w) {
#pragma unroll
        for (int q = 0; q < Tile::kShareQuads; q++) unpack(share(at, layer, p)[q * kSweepThreads], &w[0][0] + 4 * q);
    }

    __device__ __forceinline__ Arrival receive(const SweepLayout& at, int layer, int buffer) const {
        const float4* const vector = Sweeper::vector(buffer) + slot(place.lane, 0, 0);
        float values[Tile::kRowValues] = {}, first[Tile::kRows] = {}, second[Tile::kRows] = {};
#pragma unroll
        for (int p = 0; p < Tile::kSenders; p++) {
            Weights fetched;
            if (p >= Tile::kResident) fetch_share(at, layer, p, fetched);
            const Weights& other = fetched;
            const Weights& w = p < Tile::kResident ? weight[layer][p < Tile::kResident ? p : 0] : other;
#pragma unroll
            for (int r = 0; r < Tile::kRows; r++) {
                float x[4 * Tile::kQuads];
#pragma unroll
                for (int q = 0; q < Tile::kQuads; q++) {
                    const float4 quad = vector[slot(p * 32, r, q)];
                    x[4 * q] = quad.x, x[4 * q + 1] = quad.y, x[4 * q + 2] = quad.z, x[4 * q + 3] = quad.w;
                }
                first[r] += x[Tile::kColumns];
                second[r] += x[Tile::kColumns + 1];
#pragma unroll
                for (int i = 0; i < Tile::kColumns; i++)
#pragma unroll
                    for (int j = 0; j < Tile::kColumns; j++) {
                        float& product = values[r * Tile::kValues + j];
                        product = fmaf(w[j][i], x[i], product);
                    }
            }
        }
        if constexpr (Tile::kSumsAsColumns) {
#pragma unroll
            for (int r = 0; r < Tile::kRows; r++) {
                values[r * Tile::kValues + Tile::kColumns] = first[r];
                values[r * Tile::kValues + Tile::kColumns + 1] = second[r];
            }
            const float sum = reduce_values<Tile>(values, place.lane);
            const int source = (Tile::kColumns << kColumnShift) | place.row;
            return {sum, __shfl_sync(~0u, sum, source), __shfl_sync(~0u, sum, source + (1 << kColumnShift))};
        } else {
            const float first_sum = reduce_rows(first, place.lane), second_sum = reduce_rows(second, place.lane);
            return {reduce_values<Tile>(values, place.lane), first_sum, second_sum};
        }
    }

    // A layer's products with vectors in global memory, one for each of the group's `rows` (for the other rows: zeros),
    // and as the first sum theirs over the columns. Before the first exchange, by the whole block.
    __device__ __forceinline__ Arrival receive_from(const SweepLayout& at, int layer, const float* vectors,
                                                    int64_t rows, int stride) const {
        constexpr int workers = 32 * Tile::kSenders;
        for (int i = threadIdx.x; i < Tile::kRows * workers; i += kSweepThreads) {
            const int r = i / workers, worker = i % workers;
            float x[4 * Tile::kQuads] = {};
            for (int i = 0; i < Tile::kColumns; i++) {
                const int column = worker * Tile::kColumns + i;
                if (column < width && r < rows) x[i] = vectors[r * stride + column];
                x[Tile::kColumns] += x[i];
            }
            for (int q = 0; q < Tile::kQuads; q++)
                vector(0)[slot(worker, r, q)] = make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]);
        }
        __syncthreads();
        const Arrival arrival = receive(at, layer, 0);
        __syncthreads();
        return arrival;
    }

    // The block gathers its columns and sums; then every lane sends some quads of them. All its warps come here.
    __device__ __forceinline__ void depart(const SweepLayout& at, const Departure& own, int buffer) const {
        float4* const outbox = reinterpret_cast<float4*>(dynamic_shared() + at.outbox) + (buffer & 1) * Tile::kMessage;
        float* const message = reinterpret_cast<float*>(outbox + slot(place.worker % kSweepWarps, place.row, 0));
        const auto entry = [](int i) { return i / 4 * kSweepWarps * 4 + i % 4; };
        if (place.sends) message[entry(place.output)] = own.value;
        float first = own.first, second = own.second;
#pragma unroll
        for (int mask = 1 << kColumnShift; mask < 32; mask <<= 1) {
            first += __shfl_xor_sync(~0u, first, mask);
            second += __shfl_xor_sync(~0u, second, mask);
        }
        if (place.lane < Tile::kRows) {
            message[entry(Tile::kColumns)] = first;
            message[entry(Tile::kColumns + 1)] = second;
        }
        __syncthreads();
        broadcast<Tile::kMessage, kSweepThreads, 4 * Tile::kSenders>(vector(buffer), outbox, barrier(at, buffer));
    }

    static __device__ __forceinline__ uint64_t* barrier(const SweepLayout& at, int buffer) {
        return reinterpret_cast<uint64_t*>(dynamic_shared() + at.barriers) + buffer;
    }
};

template <class Tile>
__device__ __forceinline__ Place find_place(int width) {
    Place place;
    place.lane = threadIdx.x % 32;
    place.worker = cluster_rank() * kSweepWarps + threadIdx.x / 32;
    place.first = place.worker * Tile::kColumns;
    place.output = place.lane >> kColumnShift;
    place.column = place.first + place.output;
    place.row = place.lane & (Tile::kRows - 1);
    const bool repeats = (place.lane & ((1 << kColumnShift) - 1)) >= Tile::kRows;
    place.sends = place.output < Tile::kColumns && !repeats;
    place.owns = place.output < Tile::kColumns && place.column < width;
    place.writes = place.owns && !repeats;
    return place;
}

#endif

// Grid: blocks of a cluster times clusters; cluster c takes rows c * groups * Tile::kRows and on.
template <class Tile, class Step>
__global__ void __launch_bounds__(kSweepThreads, 1)
    sweep_cluster_kernel(const typename Step::Arguments args, const int groups, int* const timeout) {
#ifdef NEWLLM_CLUSTERS
    const SweepLayout at = sweep_layout<Tile, Step>(groups);
    Sweeper<Tile, Step> sweeper{find_place<Tile>(args.sweep.width), static_cast<int>(args.sweep.width)};
    const Place& place = sweeper.place;
    typename Step::State* const states =
        reinterpret_cast<typename Step::State*>(dynamic_shared() + at.state) + threadIdx.x;
    const int blocks = cluster_size();
    const uint32_t bytes = blocks * Tile::kMessage * sizeof(float4);

    for (int i = threadIdx.x; i < 2 * (groups * Tile::kVector + Tile::kMessage); i += kSweepThreads)
        sweeper.vector(0)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x == 0)
        for (int b = 0; b < 2 * groups; b++) {
            barrier_init(sweeper.barrier(at, b));
            barrier_expect(sweeper.barrier(at, b), bytes);
        }
    if (Tile::kHalf || args.half) sweeper.template load_weights<true>(at, args.sweep.weight);
    else sweeper.template load_weights<false>(at, args.sweep.weight);
    __syncthreads();
    const int64_t first_row = int64_t(blockIdx.x / blocks) * groups * Tile::kRows;
    typename Step::State state;
    for (int group = 0; group < groups; group++) {
        Step::begin(args, sweeper, at, first_row + group * Tile::kRows, state);
        if (groups > 1) states[group * kSweepThreads] = state;
    }
    const typename Step::Constants constants = Step::constants(args, sweeper, at);
    cluster_sync();

    for (int group = 0; group < groups; group++) {
        if (groups > 1) state = states[group * kSweepThreads];
        sweeper.depart(at, Step::departure(constants, state, 0), group);
    }
    const int stages = static_cast<int>(args.sweep.span.tokens) * Tile::kLayers;
    const float share = 1.0f / sweeper.width;
    bool alive = true;
    for (int first = 0; first < stages; first += Tile::kLayers) {
#pragma unroll
        for (int turn = 0; turn < Tile::kLayers; turn++) {
            const int stage = first + turn, buffer = (stage & 1) * groups;
            const bool more = stage + 1 < stages;
            for (int group = 0; group < groups; group++) {
                if (groups > 1) state = states[group * kSweepThreads];
                const auto ahead = Step::fetch(args, stage + 2 < stages, state);
                uint64_t* const barrier = sweeper.barrier(at, buffer + group);
                // After a wait that was given up nothing is waited for, so that all come to the end.
                alive = alive && __all_sync(~0u, barrier_wait(barrier, (stage >> 1) & 1));
                if (threadIdx.x == 0 && alive) barrier_expect(barrier, bytes);
                const Arrival arrival = sweeper.receive(at, Step::multiplied(turn), buffer + group);
                Step::arrive(place, constants, arrival, share, more, turn, state);
                const int next = (turn + 1) % Tile::kLayers;
                if (more) sweeper.depart(at, Step::departure(constants, state, next), groups - buffer + group);
                Step::keep(state, ahead);
                if (groups > 1) states[group * kSweepThreads] = state;
            }
        }
    }
    for (int group = 0; group < groups; group++) {
        if (groups > 1) state = states[group * kSweepThreads];
        Step::finish(args, place, first_row + group * Tile::kRows + place.row, state);
    }
    leave(alive, timeout);
#endif
}

}  // namespace newllm
