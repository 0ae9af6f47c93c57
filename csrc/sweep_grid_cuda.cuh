// The skeleton of the sweeps that need no clusters: products of a few rows, one after the other, by a team of blocks.
//
// A team takes up to kRows rows at a time and sweeps all their tokens. Every block makes its share of the columns of
// each product, with its share of the matrices in shared memory where they fit. In a stage a thread receives the same
// few columns of every row, makes of them what is multiplied (a layer norm needs a sum over the block for that), takes
// their part in all of the block's products, and after a second sum over the block some threads make the columns of
// the next vector and post them to all blocks. Two buffers suffice, because every block has a share of every vector
// and so nobody can post one before everybody has received the last but one.
#pragma once

#include "context_arguments_cuda.cuh"
#include "context_cell.h"
#include "cuda_grid.cuh"
#include "grid_product_cuda.cuh"

namespace newllm {

struct GridTeams {
    int rows;           // that a team takes at a time
    int teams, blocks;  // teams, and blocks of each
    int stride;         // of a row of packets: the widest vector, made even
    Packet* packets;    // [teams, 2, rows, stride], zeros at the beginning
    size_t shared;      // bytes of a block
    int* timeout;
    bool half;          // matrices are bfloat16
};

// What a task needs in a block's shared memory, in floats.
struct GridSizes {
    int inputs;    // of a row: the widest vector that is multiplied
    int ahead;     // of a row: what is fetched ahead of its use
    int columns;   // of a row: the block's columns of the context, at most
    int products;  // the block's columns of all products, at most
    int64_t kept;  // bytes worth keeping beyond that, matrices above all
};

// Where things lie there, in bytes.
struct GridLayout {
    size_t inputs, ahead, columns, sums, products, kept;
};

__host__ __device__ inline int most(int64_t columns, int blocks) { return int((columns + blocks - 1) / blocks); }
template <class Number>
__host__ __device__ inline Number larger(Number a, Number b) {
    return a < b ? b : a;
}
__host__ __device__ inline size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

__host__ __device__ inline GridLayout grid_layout(const GridSizes& sizes, int rows, int compiled_rows) {
    GridLayout at{};
    at.inputs = compiled_rows * sizeof(int64_t);  // after each row's first token
    at.ahead = aligned(at.inputs + size_t(rows) * sizes.inputs * sizeof(float));
    at.columns = aligned(at.ahead + size_t(rows) * sizes.ahead * sizeof(float));
    at.sums = aligned(at.columns + size_t(rows) * sizes.columns * sizeof(float));
    at.products = aligned(at.sums + size_t(kGridWarps) * compiled_rows * sizeof(float4));
    at.kept = aligned(at.products + size_t(2) * kGridWarps * sizes.products * compiled_rows * sizeof(float));
    return at;
}

// A block's columns of a vector.
struct GridShare {
    int first, count;

    __device__ bool has(int column) const { return unsigned(column - first) < unsigned(count); }
};

// sum / count, rounded once, given 1 / count: as a factor that would add the same error at every token.
__device__ __forceinline__ float quotient(float sum, float count, float part) {
    const float near = sum * part;
    return fmaf(fmaf(-near, count, sum), part, near);
}

template <class Sweep, int kRows>
struct GridMember {
    static constexpr int kMostRows = kRows;

    const Sweep& sweep;
    const GridTeams& team;
    const GridSizes sizes;
    const GridLayout at;
    const int block;        // of the team
    int64_t first = 0;      // row
    int count = 1;          // rows
    uint32_t exchange = 1;  // the next
    bool alive = true;      // no wait was given up; after that nothing is waited for, so that all come to the end
    char* room;             // of the block's shared memory what is not in use
    const float share_of_warp;  // of the context's columns
    const float part_of_warp;   // one over their number; 0 without any

    __device__ GridMember(const Sweep& sweep, const GridTeams& team, const GridSizes& sizes)
        : sweep(sweep),
          team(team),
          sizes(sizes),
          at(grid_layout(sizes, team.rows, kRows)),
          block(blockIdx.x % team.blocks),
          room(dynamic_shared() + at.kept),
          share_of_warp(float(columns_of_warp(int(sweep.width))) / sweep.width),
          part_of_warp(share_of_warp > 0.0f ? 1.0f / columns_of_warp(int(sweep.width)) : 0.0f) {}

    __device__ void take(int64_t row, int rows) {
        first = row;
        count = rows;
        room = dynamic_shared() + at.kept;
        __syncthreads();
        if (threadIdx.x < count)
            reinterpret_cast<int64_t*>(dynamic_shared())[threadIdx.x] = first_token(sweep.span, row + threadIdx.x);
        __syncthreads();
    }

    __device__ bool exists(int row) const { return kRows == 1 || row < count; }
    // In arrays with one entry a token.
    __device__ int64_t token(int row, int64_t step) const {
        return reinterpret_cast<const int64_t*>(dynamic_shared())[row] + step;
    }
    __device__ GridShare share(int64_t columns) const {
        const int begin = int(columns * block / team.blocks), end = int(columns * (block + 1) / team.blocks);
        return {begin, end - begin};
    }

    // A row of the vector that is multiplied; of what was fetched ahead; of the block's columns of the context.
    __device__ float* input(int row) const { return floats(at.inputs) + row * sizes.inputs; }
    __device__ float* ahead(int row) const { return floats(at.ahead) + row * sizes.ahead; }
    __device__ float* column(int row) const { return floats(at.columns) + row * sizes.columns; }

    // use(k) for the columns that are this thread's in every vector of so many.
    template <class Use>
    __device__ __forceinline__ void each(int width, Use use) const {
#pragma unroll 1
        for (int k = 2 * threadIdx.x; k < width; k += 2 * kGridThreads)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (k + i < width) use(k + i);
    }
    // use(row, k), likewise.
    template <class Use>
    __device__ __forceinline__ void each_of_all(int width, Use use) const {
#pragma unroll
        for (int row = 0; row < kRows; row++)
            if (exists(row)) each(width, [&](int k) { use(row, k); });
    }

    // Numbers that every stage reads, from shared memory if there is room.
    __device__ const float* keep(const float* from, int64_t n) {
        float* const kept = reinterpret_cast<float*>(reserve(n * sizeof(float)));
        if (kept == nullptr) return from;
        for (int64_t i = threadIdx.x; i < n; i += kGridThreads) kept[i] = from[i];
        __syncthreads();
        return kept;
    }

    // The block's rows of matrices [groups, outputs, segments, width], likewise.
    __device__ GridMatrix keep(const void* from, int64_t groups, int64_t outputs, int segments, int64_t width) {
        return team.half ? keep_rows(static_cast<const __nv_bfloat16*>(from), groups, outputs, segments, width)
                         : keep_rows(static_cast<const float*>(from), groups, outputs, segments, width);
    }

    // To all blocks, for the next exchange.
    __device__ void post(int row, int column, float value) const { post_packet(slots(row) + column, value, exchange); }

    // The vectors of the next exchange become the inputs, this thread's columns of them.
    __device__ __forceinline__ void receive(int width) {
        constexpr int kSteps = kRows == 1 ? 4 : 1, kStep = 2 * kGridThreads;
        for (int k = 2 * threadIdx.x; k < width; k += kSteps * kStep) {
            unsigned missing = 0;
#pragma unroll
            for (int n = 0; n < kSteps * kRows; n++)
                if (k + n / kRows * kStep < width && exists(n % kRows)) missing |= 1u << n;
            const long long since = clock64();
            while (missing && alive) {
                PacketPair pair[kSteps * kRows];
#pragma unroll
                for (int n = 0; n < kSteps * kRows; n++)
                    if (missing >> n & 1) pair[n] = read_packets(slots(n % kRows) + k + n / kRows * kStep);
#pragma unroll
                for (int n = 0; n < kSteps * kRows; n++) {
                    const int column = k + n / kRows * kStep;
                    const bool single = column + 1 == width;
                    if (!(missing >> n & 1) || !belongs(pair[n].first, exchange)) continue;
                    if (!single && !belongs(pair[n].second, exchange)) continue;
                    input(n % kRows)[column] = value_of(pair[n].first);
                    if (!single) input(n % kRows)[column + 1] = value_of(pair[n].second);
                    missing &= ~(1u << n);
                }
                if (missing) alive = clock64() - since < kPatience;
            }
        }
        exchange++;
    }

    // Replaces the inputs x by result(row, k, normed x).
    template <class Result>
    __device__ __forceinline__ void normalise(int width, float part, Result result) const {
        float mean[kRows], rstd[kRows];
        moments(width, part, mean, rstd);
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            if (!exists(row)) continue;
            each(width, [&](int k) {
                float& x = input(row)[k];
                x = result(row, k, (x - mean[row]) * rstd[row]);
            });
        }
    }

    // The inputs x are gradients times a layer norm's weight: result(row, k, gradient of what the layer norm read).
    template <class Normed, class Result>
    __device__ __forceinline__ void normalise_gradient(int width, float part, const float (&rstd)[kRows], Normed normed,
                                                       Result result) const {
        float sums[2 * kRows] = {};
        each_of_all(width, [&](int row, int k) {
            sums[2 * row] += input(row)[k];
            sums[2 * row + 1] = fmaf(input(row)[k], normed(row, k), sums[2 * row + 1]);
        });
        sum(sums);
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            if (!exists(row)) continue;
            const float first = quotient(sums[2 * row], width, part);
            const float second = quotient(sums[2 * row + 1], width, part);
            each(width, [&](int k) {
                result(row, k, layer_norm_gradient(input(row)[k], normed(row, k), first, second, rstd[row]));
            });
        }
    }

    // Products of the inputs [segments, width] with the block's `outputs` rows in each of the first `groups` matrices
    // from that group on. finish() has them.
    __device__ __forceinline__ void multiply(const GridMatrix& matrix, int64_t group, int groups, int outputs,
                                             int segments, int width) const {
        const GridFactors factors{matrix, group, at.inputs, product_parts(), sizes.inputs, sizes.products, count,
                                  groups, outputs, segments, width};
        if (team.half) {
            if (matrix.data == nullptr) grid_products<kRows, __nv_bfloat16, true>(factors);
            else grid_products<kRows, __nv_bfloat16, false>(factors);
        } else {
            if (matrix.data == nullptr) grid_products<kRows, float, true>(factors);
            else grid_products<kRows, float, false>(factors);
        }
    }

    // What one of the threads needs for its column in finish(), early: fetch(row, output).
    template <class Fetch>
    __device__ __forceinline__ float early(int outputs, Fetch fetch) const {
        const int row = threadIdx.x % kRows, output = threadIdx.x / kRows;
        return output < outputs && exists(row) ? fetch(row, output) : 0.0f;
    }

    // use(row, output, its products with the matrices, fetch(row, output)) by one thread each.
    template <int kGroups, class Fetch, class Use>
    __device__ __forceinline__ void finish(int outputs, float early, Fetch fetch, Use use) const {
        __syncthreads();
        const float* const parts = floats(product_parts());
        for (int i = threadIdx.x; i < outputs * kRows; i += kGridThreads) {
            const int row = i % kRows, output = i / kRows;
            if (!exists(row)) continue;
            const float own = i == threadIdx.x ? early : fetch(row, output);
            float sums[kGroups] = {};
#pragma unroll
            for (int w = 0; w < kGridWarps; w++)
#pragma unroll
                for (int g = 0; g < kGroups; g++)
                    sums[g] += parts[w * sizes.products * kRows + g * outputs * kRows + i];
            use(row, output, sums, own);
        }
    }

  private:
    // Of so many, those that are this warp's: 64 in every round of the block.
    static __device__ int columns_of_warp(int width) {
        const int warp = threadIdx.x / 32, rest = width % (2 * kGridThreads) - 64 * warp;
        return width / (2 * kGridThreads) * 64 + min(max(rest, 0), 64);
    }
    __device__ float* floats(size_t offset) const { return reinterpret_cast<float*>(dynamic_shared() + offset); }
    // Over the block's threads, of two values for each row.
    __device__ __forceinline__ void sum(float (&values)[2 * kRows]) const {
        constexpr int n = 2 * kRows;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const float part = sum_of_lanes<n>(values, lane);
        float* const parts = floats(at.sums);
        if (lane % (32 / n) == 0) parts[warp * n + lane / (32 / n)] = part;
        __syncthreads();
        float total[2] = {};
#pragma unroll
        for (int w = 0; w < kGridWarps; w++) total[w % 2] += parts[w * n + lane % n];
#pragma unroll
        for (int i = 0; i < n; i++) values[i] = __shfl_sync(~0u, total[0] + total[1], i);
    }

    // Of the inputs, their means and the deviations' reciprocals. A warp sums up what is left when one of its numbers is
    // taken away, so that little cancels; the warps' means and squares add up as in Chan, Golub and LeVeque (1979).
    __device__ __forceinline__ void moments(int width, float part, float (&mean)[kRows], float (&rstd)[kRows]) const {
        constexpr int n = 2 * kRows, apart = 32 / n;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float pivot[kRows], sums[n] = {};
        __syncwarp();
#pragma unroll
        for (int row = 0; row < kRows; row++)
            pivot[row] = part_of_warp > 0.0f && exists(row) ? input(row)[64 * warp] : 0.0f;
        each_of_all(width, [&](int row, int k) {
            const float x = input(row)[k] - pivot[row];
            sums[2 * row] += x;
            sums[2 * row + 1] = fmaf(x, x, sums[2 * row + 1]);
        });
        const float own = sum_of_lanes<n>(sums, lane), squares = __shfl_xor_sync(~0u, own, apart);
        const float moved = own * part_of_warp;
        float4* const parts = reinterpret_cast<float4*>(floats(at.sums));
#pragma unroll
        for (int row = 0; row < kRows; row++)
            if (lane == 2 * row * apart)
                parts[warp * kRows + row] =
                    make_float4(share_of_warp, pivot[row] + moved, fmaf(-own, moved, squares), 0.0f);
        __syncthreads();
        const float first = parts[lane % kRows].y;
        float away[2] = {}, between[2] = {}, within[2] = {};
#pragma unroll
        for (int w = 0; w < kGridWarps; w++) {
            const float4 one = parts[w * kRows + lane % kRows];
            const float from = one.y - first, weighted = one.x * from;
            away[w % 2] += weighted;
            between[w % 2] = fmaf(weighted, from, between[w % 2]);
            within[w % 2] += one.z;
        }
        const float shift = away[0] + away[1];
        const float inside = quotient(within[0] + within[1], width, part);
        const float variance = inside + fmaf(-shift, shift, between[0] + between[1]);
        const float deviation = __frsqrt_rn(variance + kLayerNormEps);
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            mean[row] = kRows == 1 ? first + shift : __shfl_sync(~0u, first + shift, row);
            rstd[row] = kRows == 1 ? deviation : __shfl_sync(~0u, deviation, row);
        }
    }

    // [warp, product, row]; those of one exchange are read while those of the next are written.
    __device__ size_t product_parts() const {
        return at.products + exchange % 2 * kGridWarps * sizes.products * kRows * sizeof(float);
    }
    __device__ Packet* slots(int row) const {
        const int64_t team_number = blockIdx.x / team.blocks;
        return team.packets + ((team_number * 2 + exchange % 2) * team.rows + row) * team.stride;
    }
    // Null where there is no room.
    __device__ char* reserve(int64_t bytes) {
        char* const begin = room;
        if (begin + aligned(bytes) > dynamic_shared() + team.shared) return nullptr;
        room += aligned(bytes);
        return begin;
    }

    template <class Value>
    __device__ GridMatrix keep_rows(const Value* from, int64_t groups, int64_t outputs, int segments, int64_t width) {
        const GridShare own = share(outputs);
        const int segment = even(width), row = segments * segment;
        Value* const kept = reinterpret_cast<Value*>(reserve(groups * own.count * row * int64_t(sizeof(Value))));
        if (kept == nullptr) {
            const int64_t whole = segments * width;
            return {from + own.first * whole, 0, outputs * whole, int(whole), int(width)};
        }
        for (int64_t line = threadIdx.x / 32; line < groups * own.count * segments; line += kGridWarps) {
            const int64_t group = line / (own.count * segments), rest = line % (own.count * segments);
            const Value* const source = from + ((group * outputs + own.first) * segments + rest) * width;
            for (int k = threadIdx.x % 32; k < segment; k += 32)
                kept[line * segment + k] = k < width ? source[k] : Value(0.0f);
        }
        __syncthreads();
        const size_t place = reinterpret_cast<char*>(kept) - dynamic_shared();
        return {nullptr, place, int64_t(own.count) * row, row, segment};
    }
};

// Task: what a team does with its rows, all tokens.
template <class Task, int kRows>
__global__ void __launch_bounds__(kGridThreads, 1)
    sweep_grid_kernel(const typename Task::Sweep sweep, const GridTeams team) {
    using Sweep = typename Task::Sweep;
    GridMember<Sweep, kRows> member(sweep, team, Task::sizes(sweep, team.blocks, team.half));
    const int64_t all = runs(sweep.span), apart = int64_t(team.teams) * team.rows;
    for (int64_t first = int64_t(blockIdx.x / team.blocks) * team.rows; first < all; first += apart) {
        member.take(first, static_cast<int>(min(int64_t(team.rows), all - first)));
        Task::run(member);
    }
    if (!member.alive) give_up(team.timeout);
}

}  // namespace newllm
