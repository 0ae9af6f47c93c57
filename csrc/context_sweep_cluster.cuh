// The skeleton of a sweep of one matrix on thread-block clusters: W in registers, one exchange a token.
//
// A cluster sweeps a few runs (rows) of tokens, four of them or one at a time (a group; groups take turns, so that one
// computes while the messages of another travel). Every warp of the cluster owns kColumns columns of the vector that
// travels. An exchange: a warp reads the whole vector from its block's shared memory, takes the products with its rows
// of W, makes of them its own columns of the next vector (`Step`, forward or adjoint), and sends these, with its share
// of two sums over the columns (the layer norm's), to every block of the cluster. No block waits for anything but the
// vector's arrival; two buffers suffice, because nobody can send a vector before it has received the last one from
// everybody.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

#include "cuda_cluster.cuh"

namespace newllm {

constexpr int kSweepWarps = 8;
constexpr int kSweepThreads = 32 * kSweepWarps;

// Columns: of one warp. Senders: the cluster has at most 32 * Senders warps. W is cut into a share for every warp that
// sends and every one that receives; a lane holds Senders of them, Resident in registers, the others in shared memory.
// Rows: of a group, 1 or 4.
template <int Columns, int Senders, int Resident, int Rows>
struct SweepTile {
    static constexpr int kColumns = Columns, kSenders = Senders, kResident = Resident, kRows = Rows;
    static constexpr int kQuads = (Columns + 2 + 3) / 4;  // of a message: columns and two sums
    static constexpr int kWarps = 32 * Senders;
    static constexpr int kPadded = Columns <= 2 ? 2 : Columns <= 4 ? 4 : 8;
    static constexpr int kShift = Columns <= 2 ? 4 : Columns <= 4 ? 3 : 2;  // lane >> kShift is the lane's column
    static constexpr bool kSumsAsColumns = Columns + 2 <= kPadded;  // they are reduced together with the products
    static constexpr int kValues = kSumsAsColumns ? Columns + 2 : Columns;
    static constexpr int kRowValues = Rows * kValues < kPadded ? kPadded : Rows * kValues;
    static constexpr int kShareQuads = Columns * Columns / 4;
    static constexpr int kVector = Rows * kQuads * kWarps;  // quads of a group's vector
    static_assert(Columns % 2 == 0 && Columns <= 8 && Resident <= Senders && (Rows == 1 || Rows == 4), "");
};

// Where things lie in a block's shared memory, in bytes.
struct SweepLayout {
    size_t weights, state, barriers, total;
};

template <class Tile, class Step>
__host__ __device__ inline SweepLayout sweep_layout(int groups) {
    SweepLayout at{};
    at.weights = size_t(2) * groups * Tile::kVector * sizeof(float4);
    at.state = at.weights + (Tile::kSenders - Tile::kResident) * Tile::kShareQuads * sizeof(float4) * kSweepThreads;
    at.barriers = at.state + (groups > 1 ? groups * sizeof(typename Step::State) * kSweepThreads : 0);
    at.total = at.barriers + 2 * groups * sizeof(uint64_t);
    return at;
}

// What a lane is responsible for: one column of one row of the group. Lanes of one column and row hold the same.
struct Place {
    int worker, lane;   // warp of the cluster, lane of the warp
    int first, column;  // the warp's first column, the lane's
    int row;            // within the group
    bool owns, writes;  // a column of the vector; and is the one lane to write it
};

// What a vector's arrival gives a lane, and what the lane gives to the next.
struct Arrival {
    float product, first_sum, second_sum;
};
struct Departure {
    float value, first, second;  // the column, and what it adds to the two sums
};

#ifdef NEWLLM_CLUSTERS

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

// Sums over all lanes of the values, rows by Tile::kValues, of which a lane gets one: of its row, of its column.
template <class Tile>
__device__ __forceinline__ float reduce_values(float (&values)[Tile::kRowValues], int lane) {
    constexpr int padded = Tile::kPadded, count = Tile::kValues;
    if constexpr (Tile::kRows == 4) {
        halve<2 * count>(values, 2, lane);
        halve<count>(values, 1, lane);
#pragma unroll
        for (int j = count; j < padded; j++) values[j] = 0.0f;
    }
    if constexpr (padded == 8) halve<4>(values, 16, lane);
    if constexpr (padded >= 4) halve<2>(values, padded == 8 ? 8 : 16, lane);
    halve<1>(values, 1 << Tile::kShift, lane);
#pragma unroll
    for (int mask = Tile::kRows; mask < 1 << Tile::kShift; mask <<= 1)
        values[0] += __shfl_xor_sync(~0u, values[0], mask);
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

template <class Tile, class Step>
struct Sweeper {
    using Weights = float[Tile::kColumns][Tile::kColumns];  // by column that is made, by column that arrived

    const Place place;
    const int width;
    float weight[Tile::kResident][Tile::kColumns][Tile::kColumns];
    SharedAddress peer_vectors, peer_barriers;  // of the block that this lane sends to
    bool sends;

    static __device__ __forceinline__ float4* vector(int buffer) {
        return reinterpret_cast<float4*>(dynamic_shared()) + buffer * Tile::kVector;
    }
    __device__ __forceinline__ float4* share(const SweepLayout& at, int p) const {
        return reinterpret_cast<float4*>(dynamic_shared() + at.weights) +
               (p - Tile::kResident) * Tile::kShareQuads * kSweepThreads + threadIdx.x;
    }
    __device__ __forceinline__ int arriving(int p, int i) const { return (p * 32 + place.lane) * Tile::kColumns + i; }

    template <bool half>
    __device__ __forceinline__ void load_share(const void* matrix, int p, Weights& w) const {
#pragma unroll
        for (int j = 0; j < Tile::kColumns; j++)
#pragma unroll
            for (int i = 0; i < Tile::kColumns; i++) {
                const int to = place.first + j, from = arriving(p, i), last = width - 1;
                const float value = load_weight<half>(matrix, Step::index(width, min(to, last), min(from, last)));
                w[j][i] = max(to, from) < width ? value : 0.0f;
            }
    }

    template <bool half>
    __device__ __forceinline__ void load_weights(const SweepLayout& at, const void* matrix) {
#pragma unroll
        for (int p = 0; p < Tile::kResident; p++) load_share<half>(matrix, p, weight[p]);
        for (int p = Tile::kResident; p < Tile::kSenders; p++) {
            Weights w;
            load_share<half>(matrix, p, w);
            store_share(at, p, w);
        }
    }

    __device__ __forceinline__ void store_share(const SweepLayout& at, int p, const Weights& w) const {
#pragma unroll
        for (int q = 0; q < Tile::kShareQuads; q++) {
            const float* flat = &w[0][0] + 4 * q;
            share(at, p)[q * kSweepThreads] = make_float4(flat[0], flat[1], flat[2], flat[3]);
        }
    }

    __device__ __forceinline__ void fetch_share(const SweepLayout& at, int p, Weights& w) const {
#pragma unroll
        for (int q = 0; q < Tile::kShareQuads; q++) {
            const float4 quad = share(at, p)[q * kSweepThreads];
            float* flat = &w[0][0] + 4 * q;
            flat[0] = quad.x, flat[1] = quad.y, flat[2] = quad.z, flat[3] = quad.w;
        }
    }

    // W's columns times the factors.
    __device__ __forceinline__ void scale(const SweepLayout& at, const float* factors) {
#pragma unroll
        for (int p = 0; p < Tile::kSenders; p++) {
            Weights w;
            Weights& scaled = p < Tile::kResident ? weight[p < Tile::kResident ? p : 0] : w;
            if (p >= Tile::kResident) fetch_share(at, p, w);
#pragma unroll
            for (int i = 0; i < Tile::kColumns; i++) {
                const float factor = factors[min(arriving(p, i), width - 1)];
#pragma unroll
                for (int j = 0; j < Tile::kColumns; j++) scaled[j][i] *= factor;
            }
            if (p >= Tile::kResident) store_share(at, p, w);
        }
    }

    __device__ __forceinline__ Arrival receive(const SweepLayout& at, int buffer) const {
        const float4* const vector = Sweeper::vector(buffer) + place.lane;
        float values[Tile::kRowValues] = {}, first[Tile::kRows] = {}, second[Tile::kRows] = {};
#pragma unroll
        for (int p = 0; p < Tile::kSenders; p++) {
            Weights fetched;
            if (p >= Tile::kResident) fetch_share(at, p, fetched);
            const Weights& other = fetched;
            const Weights& w = p < Tile::kResident ? weight[p < Tile::kResident ? p : 0] : other;
#pragma unroll
            for (int r = 0; r < Tile::kRows; r++) {
                float x[4 * Tile::kQuads];
#pragma unroll
                for (int q = 0; q < Tile::kQuads; q++) {
                    const float4 quad = vector[(r * Tile::kQuads + q) * Tile::kWarps + p * 32];
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
            const int source = (Tile::kColumns << Tile::kShift) | place.row;
            return {sum, __shfl_sync(~0u, sum, source), __shfl_sync(~0u, sum, source + (1 << Tile::kShift))};
        } else {
            const float first_sum = reduce_rows(first, place.lane), second_sum = reduce_rows(second, place.lane);
            return {reduce_values<Tile>(values, place.lane), first_sum, second_sum};
        }
    }

    // The products with vectors in global memory, one for each of the group's `rows` (null: all ones; for the other
    // rows: zeros), and as the first sum theirs over the columns. Before the first exchange, by the whole block.
    __device__ __forceinline__ Arrival receive_from(const SweepLayout& at, const float* vectors, int64_t rows,
                                                    int stride) const {
        for (int slot = threadIdx.x; slot < Tile::kRows * Tile::kWarps; slot += kSweepThreads) {
            const int r = slot / Tile::kWarps, worker = slot % Tile::kWarps;
            float x[4 * Tile::kQuads] = {};
            for (int i = 0; i < Tile::kColumns; i++) {
                const int column = worker * Tile::kColumns + i;
                if (column < width && r < rows) x[i] = vectors ? vectors[r * stride + column] : 1.0f;
                x[Tile::kColumns] += x[i];
            }
            for (int q = 0; q < Tile::kQuads; q++)
                vector(0)[(r * Tile::kQuads + q) * Tile::kWarps + worker] =
                    make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]);
        }
        __syncthreads();
        const Arrival arrival = receive(at, 0);
        __syncthreads();
        return arrival;
    }

    // Every lane gathers the warp's columns and sends some quads of each row's message to one block.
    __device__ __forceinline__ void depart(const Departure& own, int buffer) const {
        const bool upper = place.lane >= 16;
        const SharedAddress barrier = peer_barriers + buffer * sizeof(uint64_t);
        const SharedAddress base = peer_vectors + (buffer * Tile::kVector + place.worker) * sizeof(float4);
#pragma unroll
        for (int r = 0; r < Tile::kRows; r++) {
            float x[4 * Tile::kQuads] = {}, first = 0.0f, second = 0.0f;
#pragma unroll
            for (int j = 0; j < Tile::kColumns; j++)
                x[j] = __shfl_sync(~0u, own.value, (j << Tile::kShift) | r);
#pragma unroll
            for (int j = 0; j < Tile::kColumns; j += 2) {
                const int even = (j << Tile::kShift) | r, odd = even + (1 << Tile::kShift);
                if constexpr (Step::kSumsOfValue) {
                    first += x[j] + x[j + 1];
                    second += fmaf(x[j], x[j], x[j + 1] * x[j + 1]);
                } else {
                    first += __shfl_sync(~0u, own.first, even) + __shfl_sync(~0u, own.first, odd);
                    second += __shfl_sync(~0u, own.second, even) + __shfl_sync(~0u, own.second, odd);
                }
            }
            x[Tile::kColumns] = first;
            x[Tile::kColumns + 1] = second;
#pragma unroll
            for (int q = 0; q < Tile::kQuads; q += 2) {
                const int other = q + 1 < Tile::kQuads ? q + 1 : q, mine = upper ? other : q;
                const float4 quad = make_float4(upper ? x[4 * other] : x[4 * q], upper ? x[4 * other + 1] : x[4 * q + 1],
                                                upper ? x[4 * other + 2] : x[4 * q + 2],
                                                upper ? x[4 * other + 3] : x[4 * q + 3]);
                if (sends && (other != q || !upper))
                    send(base + (r * Tile::kQuads + mine) * Tile::kWarps * sizeof(float4), quad, barrier);
            }
        }
    }
};

template <class Tile>
__device__ __forceinline__ Place find_place(int width) {
    Place place;
    place.lane = threadIdx.x % 32;
    place.worker = cluster_rank() * kSweepWarps + threadIdx.x / 32;
    place.first = place.worker * Tile::kColumns;
    const int output = place.lane >> Tile::kShift, rest = place.lane & ((1 << Tile::kShift) - 1);
    place.column = place.first + output;
    place.row = rest & (Tile::kRows - 1);
    place.owns = output < Tile::kColumns && place.column < width;
    place.writes = place.owns && rest < Tile::kRows;
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
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(dynamic_shared() + at.barriers);
    typename Step::State* const states =
        reinterpret_cast<typename Step::State*>(dynamic_shared() + at.state) + threadIdx.x;
    const int blocks = cluster_size(), peer = place.lane % 16;
    sweeper.sends = peer < blocks;
    sweeper.peer_vectors = remote_address(sweeper.vector(0), sweeper.sends ? peer : 0);
    sweeper.peer_barriers = remote_address(barriers, sweeper.sends ? peer : 0);
    const uint32_t bytes = blocks * kSweepWarps * Tile::kRows * Tile::kQuads * sizeof(float4);

    for (int i = threadIdx.x; i < 2 * groups * Tile::kVector; i += kSweepThreads)
        sweeper.vector(0)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x == 0)
        for (int b = 0; b < 2 * groups; b++) {
            barrier_init(barriers + b);
            barrier_expect(barriers + b, bytes);
        }
    if (args.half) sweeper.template load_weights<true>(at, args.sweep.weight);
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
        sweeper.depart(Step::departure(state), group);
    }
    const int tokens = args.sweep.span.tokens;
    const float share = 1.0f / sweeper.width;
    bool alive = true;
    for (int token = 0; token < tokens && alive; token++) {
        const int buffer = (token & 1) * groups;
        for (int group = 0; group < groups && alive; group++) {
            if (groups > 1) state = states[group * kSweepThreads];
            const auto ahead = Step::fetch(args, token + 2 < tokens, state);
            alive = __all_sync(~0u, barrier_wait(barriers + buffer + group, (token >> 1) & 1));
            if (threadIdx.x == 0) barrier_expect(barriers + buffer + group, bytes);
            Step::arrive(place, constants, sweeper.receive(at, buffer + group), share, token + 1 < tokens, state);
            if (token + 1 < tokens) sweeper.depart(Step::departure(state), groups - buffer + group);
            Step::keep(state, ahead);
            if (groups > 1) states[group * kSweepThreads] = state;
        }
    }
    if (!alive && place.lane == 0) give_up(timeout);
    cluster_sync();
#endif
}

}  // namespace newllm
