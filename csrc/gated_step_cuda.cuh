// The gated cell's sweeps on clusters: what a block makes of the vectors' arrivals, forwards and backwards.
#pragma once

#include "cuda_grid.cuh"
#include "gated_cluster_cuda.cuh"

namespace newllm {

// What travels is what the layer norm reads, less a number near its mean (the mean of the last one), so that its
// variance may be had from sums and squares. Every warp applies the layer norm to the columns that it multiplies.
struct GatedForwardStep {
    using Sweep = GatedForward;

#ifdef NEWLLM_CLUSTERS

    template <class Tile>
    struct Contexts {
        float gain[Tile::kShare], shift[Tile::kShare], centre;
        float* output;  // of the next token to arrive, the lane's first column
    };

    template <class Tile>
    static __device__ __forceinline__ void run(GatedMember<Tile, Sweep>& member) {
        const Sweep& sweep = member.sweep;
        const int width = member.width, hidden = member.hidden, column = member.column();
        const int64_t tokens = sweep.span.tokens, row = member.first_row + member.row();
        const int64_t first = member.exists ? first_token(sweep.span, row) : 0;
        const bool makes_hidden = member.makes() && member.exists && column < hidden;
        const float* drive = makes_hidden ? sweep.drive + first * hidden + column : nullptr;
        const bool makes_context = member.makes() && column < width;
        float bias[kGates] = {}, now = makes_hidden ? *drive : 0.0f;
        for (int g = 0; g < kGates; g++)
            if (makes_context) bias[g] = sweep.bias_gate[g * width + column];
        Contexts<Tile> contexts;
        start(member, first, contexts);
        cluster_sync();
        for (int64_t token = 0; token < tokens; token++) {
            if (token > 0) arrive(member, token - 1, contexts);
            __syncwarp();
            typename GatedMember<Tile, Sweep>::Sums sums = {};
            member.multiply_slot(0, 0, sums);
            member.put_part(0, sums);
            __syncthreads();
            if (member.makes()) {
                const float x = member.take_parts(0) + now;
                member.post_hidden(column >= hidden || x < 0.0f ? 0.0f : x);  // NaN stays
            }
            member.depart(kHiddenVector);
            if (makes_hidden && token + 1 < tokens) now = *(drive += hidden);
            member.await(kHiddenVector, token);
#pragma unroll
            for (int g = 0; g < kGates; g++) {
                typename GatedMember<Tile, Sweep>::Sums sums = {};
                member.multiply_hidden(1 + g, sums);
                member.put_part(g, sums);
            }
            __syncthreads();
            if (member.makes()) {
                float read[kGates];
#pragma unroll
                for (int g = 0; g < kGates; g++) read[g] = member.take_parts(g) + bias[g];
                const float context = member.own(member.output(), member.row());
                const float update = gated_update(context, read[0], read[1], read[2]) - contexts.centre;
                const float value = makes_context ? update : 0.0f;
                member.post_context(value, value, value * value);
            }
            member.depart(kContextVector);
        }
        arrive(member, tokens - 1, contexts);
        // The last context, which its lanes wrote as an output.
#pragma unroll
        for (int i = 0; i < Tile::kShare; i++) {
            const int k = member.arriving(i);
            if (member.exists && member.owns(k) && k < width)
                sweep.last[row * width + k] = contexts.output[member.local(i) - member.local(0) - width];
        }
    }

    template <class Tile>
    static __device__ __forceinline__ void start(const GatedMember<Tile, Sweep>& member, int64_t first,
                                                 Contexts<Tile>& contexts) {
        const Sweep& sweep = member.sweep;
        const int width = member.width;
        const float* const from = sweep.start + (member.first_row + member.row()) * width;
        contexts.output = sweep.outputs + first * width + member.arriving(0);
        float total = 0.0f;
        for (int k = member.local(0); k < width && member.exists; k += member.local(1) - member.local(0))
            total += from[k];
#pragma unroll
        for (int mask = Tile::kRows; mask < 32; mask <<= 1) total += __shfl_xor_sync(~0u, total, mask);
        contexts.centre = total * member.share;
#pragma unroll
        for (int i = 0; i < Tile::kShare; i++) {
            const int k = member.arriving(i);
            contexts.gain[i] = k < width ? sweep.ln_weight[k] : 0.0f;
            contexts.shift[i] = k < width ? sweep.ln_bias[k] : 0.0f;
            keep(member, i, k < width && member.exists ? from[k] : 0.0f);
        }
    }

    // A context for the product, and for the makers.
    template <class Tile>
    static __device__ __forceinline__ void keep(const GatedMember<Tile, Sweep>& member, int i, float context) {
        const int k = member.arriving(i);
        member.slot(member.row(), 0)[member.local(i)] = __uint_as_float(split(context));
        if (member.owns(k)) member.own(k - member.rank * kGatedColumns, member.row()) = context;
    }

    template <class Tile>
    static __device__ __forceinline__ void arrive(GatedMember<Tile, Sweep>& member, int64_t token,
                                                  Contexts<Tile>& contexts) {
        const Sweep& sweep = member.sweep;
        const int width = member.width;
        member.await(kContextVector, token);
        const float2 sums = member.arrived_sums();
        const float mean = sums.x * member.share;
        const float rstd = rsqrtf(fmaf(-mean, mean, sums.y * member.share) + kLayerNormEps);
        contexts.centre += mean;
#pragma unroll
        for (int i = 0; i < Tile::kShare; i++) {
            const int k = member.arriving(i);
            const float normed = (member.arrived(k) - mean) * rstd;
            // Beyond the width both are 0.
            const float free = fmaf(normed, contexts.gain[i], contexts.shift[i]);
            const float below = free > sweep.clamp ? sweep.clamp : free;  // NaN stays
            const float context = below < -sweep.clamp ? -sweep.clamp : below;
            keep(member, i, context);
            if (member.exists && member.owns(k) && k < width)
                contexts.output[member.local(i) - member.local(0)] = context;
        }
        contexts.output += width;
    }

#endif
};

// What travels is the gradient of what the layer norm makes times its weight; every warp makes of it the gradients of
// what the gates' functions read, in the columns that it multiplies. What those need is copied into the slots ahead:
// normed and the gates' slopes, which their gradients take the place of.
struct GatedAdjointStep {
    using Sweep = GatedAdjoint;

#ifdef NEWLLM_CLUSTERS

    struct Column {  // of a maker, at one token
        float outer, inside, normed, forget, made;
    };

    template <class Tile>
    static __device__ __forceinline__ void run(GatedMember<Tile, Sweep>& member) {
        const Sweep& sweep = member.sweep;
        const int width = member.width, hidden = member.hidden, column = member.column();
        const int64_t row = member.first_row + member.row(), steps = sweep.span.tokens;
        int64_t token = (member.exists ? first_token(sweep.span, row) : 0) + steps - 1;
        const bool makes_context = member.makes() && member.exists && column < width;
        const bool makes_hidden = member.makes() && member.exists && column < hidden;
        const float gain = makes_context ? sweep.ln_weight[column] : 0.0f;
        float rstd = member.exists ? sweep.rstd[token] : 0.0f;
        copy_slots(member, token);
        Column now = fetch(sweep, token, column, makes_context, makes_hidden);
        const auto enter = [&](float carry) {
            const float total = (now.outer + carry) * now.inside, weighted = makes_context ? total * gain : 0.0f;
            if (makes_context && member.writes()) sweep.total[token * width + column] = total;
            member.post_context(weighted, weighted, weighted * now.normed);
        };
        cluster_sync();
        if (member.makes()) enter(makes_context ? sweep.last[row * width + column] : 0.0f);
        member.depart(kContextVector);
        for (int64_t step = 0; step < steps; step++) {
            const bool more = step + 1 < steps;
            arrive(member, step, token, rstd);
            __syncwarp();
            typename GatedMember<Tile, Sweep>::Sums sums = {};
#pragma unroll
            for (int g = 0; g < kGates; g++) member.multiply_slot(1 + g, 1 + g, sums);
            member.put_part(0, sums);
            __syncthreads();
            if (member.makes()) {
                const float product = member.take_parts(0);
                const float change = column >= hidden || now.made <= 0.0f ? 0.0f : product;
                if (makes_hidden && member.writes()) sweep.hidden_change[token * hidden + column] = change;
                member.post_hidden(change);
            }
            member.depart(kHiddenVector);
            // Not before the products, which need all registers.
            if (more) copy_slots(member, token - 1);
            const Column next = fetch(sweep, token - 1, column, makes_context && more, makes_hidden && more);
            const float rstd_ahead = more && member.exists ? sweep.rstd[token - 1] : 0.0f;
            member.await(kHiddenVector, step);
            typename GatedMember<Tile, Sweep>::Sums carried = {};
            member.multiply_hidden(0, carried);
            member.put_part(0, carried);
            __syncthreads();
            const float forget = now.forget;
            now = next;
            rstd = rstd_ahead;
            token -= 1;
            if (member.makes()) {
                const float inner = member.own(member.output(), member.row());
                const float carry = fmaf(inner, forget, member.take_parts(0));
                if (more) enter(carry);
                else if (makes_context && member.writes()) sweep.start[row * width + column] = carry;
            }
            if (more) member.depart(kContextVector);
        }
    }

    static __device__ __forceinline__ Column fetch(const Sweep& sweep, int64_t token, int column, bool context,
                                                   bool hidden) {
        Column next = {};
        if (hidden) next.made = sweep.hidden_output[token * sweep.hidden + column];
        if (!context) return next;
        const int64_t at = token * sweep.width + column;
        next.outer = sweep.outer[at];
        next.inside = sweep.inside == nullptr ? 1.0f : sweep.inside[at];
        next.normed = sweep.normed[at];
        next.forget = sweep.forget[at];
        return next;
    }

    template <class Tile>
    static __device__ __forceinline__ void copy_slots(const GatedMember<Tile, Sweep>& member, int64_t token) {
        const Sweep& sweep = member.sweep;
#pragma unroll
        for (int i = 0; i < Tile::kShare; i++) {
            const int k = member.arriving(i);
            if (k >= member.width || !member.exists) continue;
            float* const to = member.slot(member.row(), 0) + member.local(i);
            copy_ahead(to, sweep.normed + token * member.width + k);
#pragma unroll
            for (int g = 0; g < kGates; g++)
                copy_ahead(to + (1 + g) * kReach, sweep.gate_slope + (token * kGates + g) * member.width + k);
        }
    }

    template <class Tile>
    static __device__ __forceinline__ void arrive(GatedMember<Tile, Sweep>& member, int64_t step, int64_t token,
                                                  float rstd) {
        const Sweep& sweep = member.sweep;
        const int width = member.width;
        await_copies();
        member.await(kContextVector, step);
        const float2 sums = member.arrived_sums();
        const float mean = sums.x * member.share, mean_normed = sums.y * member.share;
#pragma unroll
        for (int i = 0; i < Tile::kShare; i++) {
            const int k = member.arriving(i);
            if (k >= width) continue;  // their slots stay 0
            float* const slot = member.slot(member.row(), 0) + member.local(i);
            const float inner = layer_norm_gradient(member.arrived(k), *slot, mean, mean_normed, rstd);
            const bool writes = member.owns(k);
            if (writes) member.own(k - member.rank * kGatedColumns, member.row()) = inner;
#pragma unroll
            for (int g = 0; g < kGates; g++) {
                const float change = inner * slot[(1 + g) * kReach];
                slot[(1 + g) * kReach] = __uint_as_float(split(change));
                if (writes && member.exists) sweep.gate_change[(token * kGates + g) * width + k] = change;
            }
        }
    }

#endif
};

template <class Tile, class Step>
__global__ void __launch_bounds__(kGatedThreads, 1)
    gated_cluster_kernel(const typename Step::Sweep sweep, int* const timeout) {
#ifdef NEWLLM_CLUSTERS
    GatedMember<Tile, typename Step::Sweep> member(sweep);
    member.begin();
    Step::run(member);
    leave(member.alive, timeout);
#endif
}

}  // namespace newllm
