// The context cell as steps of a sweep on clusters: what a lane makes of a vector's arrival.
#pragma once

#include "context_arguments_cuda.cuh"
#include "context_cell.h"
#include "context_sweep_cluster.cuh"

namespace newllm {

// What travels is u, which the layer norm reads, less a number near its mean (the mean of the last one), so that its
// variance may be had from sums and squares, times the layer norm's weight. Its mean, deviation and bias are applied to
// the product, which therefore need not wait for them.
template <int Layers>
struct ContextForwardStep {
    using Arguments = ContextForwardArguments;
    // By the layer that arrives, which is multiplied with the next one's W.
    struct Constants {
        float gain[Layers], shift[Layers];      // the layer norm's weight and bias
        float row_sum[Layers], offset[Layers];  // of the next W times the weights; of it times the biases
        int stride;
    };
    struct State {
        const float* drive;  // of the next stage that is to be read; null: nothing to read or write
        float* output;       // of the next stage
        float value, now, centre[Layers];
    };

    static constexpr __device__ int after(int layer) { return (layer + 1) % Layers; }
    // The layer whose matrix what arrives is multiplied with.
    static constexpr __device__ int multiplied(int turn) { return after(turn); }

    static __device__ __forceinline__ int index(int width, int to, int from) { return to * width + from; }

    template <class Sweeper>
    static __device__ __forceinline__ void begin(const Arguments& args, const Sweeper& sweeper, const SweepLayout& at,
                                                 int64_t first_row, State& state) {
        const ContextForward& sweep = args.sweep;
        const Place& place = sweeper.place;
        const int64_t row = first_row + place.row;
        const float* const starts = sweep.start + first_row * sweep.width;
        const Arrival start = sweeper.receive_from(at, 0, starts, runs(sweep.span) - first_row, sweeper.width);
        const bool exists = place.owns && row < runs(sweep.span);
        const int64_t offset = exists ? first_token(sweep.span, row) * Layers * sweep.width + place.column : 0;
        state.drive = exists ? sweep.drive + offset : nullptr;
        state.output = sweep.outputs + offset;
#pragma unroll
        for (float& centre : state.centre) centre = start.first_sum / sweep.width;
        const float drive = next(args, true, state);
        const float context = exists ? starts[place.row * sweep.width + place.column] : 0.0f;
        const float update = context_update(context, start.product + drive);
        state.value = place.owns ? update - state.centre[0] : 0.0f;
        state.now = next(args, sweep.span.tokens * Layers > 1, state);
    }

    template <class Sweeper>
    static __device__ __forceinline__ Constants constants(const Arguments& args, const Sweeper& sweeper,
                                                          const SweepLayout& at) {
        const int column = min(sweeper.place.column, sweeper.width - 1);
        Constants own;
        constexpr int64_t all = 4;  // rows of a group, at most
#pragma unroll
        for (int layer = 0; layer < Layers; layer++) {
            const float* const weights = args.sweep.ln_weight + layer * sweeper.width;
            const float* const biases = args.sweep.ln_bias + layer * sweeper.width;
            own.gain[layer] = weights[column];
            own.shift[layer] = biases[column];
            own.offset[layer] = sweeper.receive_from(at, after(layer), biases, all, 0).product;
            own.row_sum[layer] = sweeper.receive_from(at, after(layer), weights, all, 0).product;
        }
        own.stride = sweeper.width;
        return own;
    }

    static __device__ __forceinline__ Departure departure(const Constants& constants, const State& state, int layer) {
        return {state.value * constants.gain[layer], state.value, state.value * state.value};
    }

    static __device__ __forceinline__ float next(const Arguments& args, bool more, State& state) {
        if (!more || state.drive == nullptr) return 0.0f;
        const float drive = *state.drive;
        state.drive += args.sweep.width;
        return drive;
    }
    static __device__ __forceinline__ float fetch(const Arguments& args, bool more, State& state) {
        return next(args, more, state);
    }
    static __device__ __forceinline__ void keep(State& state, float ahead) { state.now = ahead; }

    static __device__ __forceinline__ void arrive(const Place& place, const Constants& constants,
                                                  const Arrival& arrival, float share, bool, int layer,
                                                  State& state) {
        const float mean = arrival.first_sum * share;
        const float rstd = rsqrtf(fmaf(-mean, mean, arrival.second_sum * share) + kLayerNormEps);
        const float context = fmaf((state.value - mean) * rstd, constants.gain[layer], constants.shift[layer]);
        const float product = fmaf(-mean, constants.row_sum[layer], arrival.product);
        const float update = context_update(context, fmaf(product, rstd, constants.offset[layer] + state.now));
        state.centre[layer] += mean;
        state.value = place.owns ? update - state.centre[after(layer)] : 0.0f;
        if (place.writes && state.drive != nullptr) *state.output = context;
        state.output += constants.stride;
    }

    static __device__ __forceinline__ void finish(const Arguments& args, const Place& place, int64_t row,
                                                  const State& state) {
        if (!place.writes || state.drive == nullptr) return;
        args.sweep.last[row * args.sweep.width + place.column] = *(state.output - args.sweep.width);
    }
};

// What travels is slope * weighted, and the sums the layer norm's gradient needs. That gradient is linear:
//   W^T change = rstd (W^T (slope weighted) - mean(weighted) W^T slope - mean(weighted normed) W^T (slope normed))
// and the last two products, which depend on no later token, are given for all tokens.
template <int Layers>
struct ContextAdjointStep {
    using Arguments = ContextAdjointArguments;
    struct Constants {
        float gain[Layers];  // the layer norm's weight
        int stride;
        float *total, *change;
    };
    struct Column {  // at one stage
        float outer, slope, normed, rstd, slope_product, normed_product;
    };
    struct State {
        int64_t read, token, write;  // of the next stage to be read, its column and itself; of the one that arrives
        int64_t start;               // in the gradient of the start; -1: nothing to read or write
        float weighted;
        Column now, next;
    };

    static constexpr __device__ int multiplied(int turn) { return Layers - 1 - turn; }

    static __device__ __forceinline__ int index(int width, int to, int from) { return from * width + to; }

    template <class Sweeper>
    static __device__ __forceinline__ void begin(const Arguments& args, const Sweeper& sweeper, const SweepLayout&,
                                                 int64_t first_row, State& state) {
        const ContextAdjoint& sweep = args.sweep;
        const Place& place = sweeper.place;
        const int64_t row = first_row + place.row;
        const bool exists = place.owns && row < runs(sweep.span);
        state.start = exists ? row * sweep.width + place.column : -1;
        state.token = exists ? (first_token(sweep.span, row) + sweep.span.tokens) * Layers - 1 : 0;
        state.write = state.read = state.token * sweep.width + place.column;
        state.now = fetch(args, true, state);
        state.next = fetch(args, sweep.span.tokens * Layers > 1, state);
        const Constants own = constants(args, sweeper, {});
        enter(place, own, exists ? sweep.last[state.start] : 0.0f, multiplied(0), state);
    }

    template <class Sweeper>
    static __device__ __forceinline__ Constants constants(const Arguments& args, const Sweeper& sweeper,
                                                          const SweepLayout&) {
        const int column = min(sweeper.place.column, sweeper.width - 1);
        Constants own;
#pragma unroll
        for (int layer = 0; layer < Layers; layer++)
            own.gain[layer] = args.sweep.ln_weight[layer * sweeper.width + column];
        own.stride = sweeper.width;
        own.total = args.sweep.total;
        own.change = args.sweep.change;
        return own;
    }

    // The gradient of the output at the stage that is now.
    static __device__ __forceinline__ void enter(const Place& place, const Constants& constants, float carry,
                                                 int layer, State& state) {
        const float total = state.now.outer + carry;
        state.weighted = place.owns ? total * constants.gain[layer] : 0.0f;
        if (place.writes && state.start >= 0) constants.total[state.write] = total;
    }

    static __device__ __forceinline__ Departure departure(const Constants&, const State& state, int) {
        return {state.now.slope * state.weighted, state.weighted, state.weighted * state.now.normed};
    }

    static __device__ __forceinline__ Column fetch(const Arguments& args, bool more, State& state) {
        if (!more || state.start < 0) return {};
        const int64_t at = state.read;
        const ContextAdjoint& sweep = args.sweep;
        const Column column{sweep.outer[at],          sweep.slope[at],         sweep.normed[at],
                            sweep.rstd[state.token], sweep.slope_product[at], sweep.normed_product[at]};
        state.read -= args.sweep.width;
        state.token -= 1;
        return column;
    }
    static __device__ __forceinline__ void keep(State& state, const Column& ahead) { state.next = ahead; }

    static __device__ __forceinline__ void arrive(const Place& place, const Constants& constants,
                                                  const Arrival& arrival, float share, bool more, int turn,
                                                  State& state) {
        const float mean = arrival.first_sum * share, mean_normed = arrival.second_sum * share;
        const Column now = state.now;
        const float gradient = layer_norm_gradient(state.weighted, now.normed, mean, mean_normed, now.rstd);
        const float removed = fmaf(mean, now.slope_product, mean_normed * now.normed_product);
        const float carry = fmaf(arrival.product - removed, now.rstd, gradient);
        const bool writes = place.writes && state.start >= 0;
        if (writes) constants.change[state.write] = gradient * now.slope;
        state.write -= constants.stride;
        state.now = state.next;
        if (more) enter(place, constants, carry, multiplied((turn + 1) % Layers), state);
        else state.weighted = carry;  // for finish
    }

    static __device__ __forceinline__ void finish(const Arguments& args, const Place& place, int64_t,
                                                  const State& state) {
        if (place.writes && state.start >= 0) args.sweep.start[state.start] = state.weighted;
    }
};

}  // namespace newllm
