// The context cell as steps of a sweep on tensor cores: what a row's warp makes of a vector's arrival. One layer.
//
// The formulas are those of context_step_cuda.cuh, but here the layer norm's weight is multiplied into the vector that
// travels, so that W stays what it is.
#pragma once

#include "context_arguments_cuda.cuh"
#include "context_cell.h"
#include "context_sweep_tensor.cuh"

namespace newllm {

template <int Strips>
struct ContextForwardRows {
    using Arguments = ContextForwardArguments;

    const float* drive;  // of the next token that is to be read
    float* output;       // of the next token
    float gain[Strips], shift[Strips];      // the layer norm's weight and bias
    float row_sum[Strips], offset[Strips];  // W times the weights, W times the biases
    float value[Strips];                    // u less the centre, which travels times the weight
    float centre;
    float now[Strips];  // the drive of the token after
    bool exists;

    static __device__ __forceinline__ int index(int width, int to, int from) { return to * width + from; }

    template <class Sweeper>
    __device__ __forceinline__ void begin(const Arguments& args, const Sweeper& sweeper) {
        const RowPlace& place = sweeper.place;
        const Span& span = args.sweep.span;
        exists = place.row < runs(span);
        const int64_t first = exists ? first_token(span, place.row) * place.width + place.first : 0;
        drive = args.sweep.drive + first;
        output = args.sweep.outputs + first;
        const float* const start = args.sweep.start + place.row * place.width;
        float total = 0.0f;
        for (int i = place.lane; i < place.width && exists; i += 32) total += start[i];
        centre = sum_lanes<32>(total) / place.width;
        take_products(args, sweeper);
        fetch(args, place, true);
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const bool owns = place.owns(s), reads = exists && owns;
            const int column = owns ? place.column(s) : 0;
            gain[s] = args.sweep.ln_weight[column];
            shift[s] = args.sweep.ln_bias[column];
            const float context = reads ? start[column] : 0.0f;
            value[s] = reads ? context_update(context, value[s] + now[s]) - centre : 0.0f;
        }
    }

    // W times the layer norm's weights, its biases, and the starts of eight rows: through shared memory, where it
    // takes the place of the quarters' sums.
    template <class Sweeper>
    __device__ __forceinline__ void take_products(const Arguments& args, const Sweeper& sweeper) {
        constexpr int count = 2 + kTensorRows, together = 4;
        const RowPlace& place = sweeper.place;
        const int64_t first_row = place.row - place.warp;
        float* const products = sweeper.sums(0, 0);
        for (int j = place.warp * together; j < 32 * Strips; j += kTensorRows * together) {
            float sum[count][together] = {};
            for (int from = place.lane; from < place.width; from += 32) {
                float w[together];
#pragma unroll
                for (int i = 0; i < together; i++) {
                    const int to = place.rank * 32 * Strips + j + i;
                    w[i] = to < place.width ? sweeper.load(args.sweep.weight, index(place.width, to, from)) : 0.0f;
                }
#pragma unroll
                for (int v = 0; v < count; v++) {
                    const int64_t row = first_row + v - 2;
                    const float* const vector = v == 0   ? args.sweep.ln_weight
                                                : v == 1 ? args.sweep.ln_bias
                                                         : args.sweep.start + row * place.width;
                    const float x = v < 2 || row < runs(args.sweep.span) ? vector[from] : 0.0f;
#pragma unroll
                    for (int i = 0; i < together; i++) sum[v][i] = fmaf(w[i], x, sum[v][i]);
                }
            }
#pragma unroll
            for (int v = 0; v < count; v++)
#pragma unroll
                for (int i = 0; i < together; i++) {
                    const float product = sum_lanes<32>(sum[v][i]);
                    if (place.lane == 0) products[v * 32 * Strips + j + i] = product;
                }
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const int column = 32 * s + place.lane;
            row_sum[s] = products[column];
            offset[s] = products[32 * Strips + column];
            value[s] = products[(2 + place.warp) * 32 * Strips + column];
        }
        __syncthreads();
    }

    __device__ __forceinline__ void fetch(const Arguments&, const RowPlace& place, bool more) {
#pragma unroll
        for (int s = 0; s < Strips; s++) now[s] = more && exists && place.owns(s) ? drive[32 * s] : 0.0f;
        if (more) drive += place.width;
    }

    __device__ __forceinline__ RowDeparture<Strips> departure() const {
        RowDeparture<Strips> departure{};
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            departure.value[s] = gain[s] * value[s];
            departure.first += value[s];
            departure.second = fmaf(value[s], value[s], departure.second);
        }
        return departure;
    }

    __device__ __forceinline__ void arrive(const Arguments&, const RowPlace& place, const RowArrival<Strips>& arrival,
                                           bool) {
        const float share = 1.0f / place.width, mean = arrival.first_sum * share;
        const float rstd = rsqrtf(fmaf(-mean, mean, arrival.second_sum * share) + kLayerNormEps);
        centre += mean;
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const float context = fmaf((value[s] - mean) * rstd, gain[s], shift[s]);
            const float product = fmaf(-mean, row_sum[s], arrival.product[s]);
            const bool has = exists && place.owns(s);
            value[s] = has ? context_update(context, fmaf(product, rstd, offset[s] + now[s])) - centre : 0.0f;
            if (has) output[32 * s] = context;
        }
        output += place.width;
    }

    __device__ __forceinline__ void finish(const Arguments& args, const RowPlace& place) const {
        for (int s = 0; s < Strips; s++)
            if (exists && place.owns(s))
                args.sweep.last[place.row * place.width + place.column(s)] = output[32 * s - place.width];
    }
};

template <int Strips>
struct ContextAdjointRows {
    using Arguments = ContextAdjointArguments;
    struct Columns {  // at one token
        float outer[Strips], slope[Strips], normed[Strips], slope_product[Strips], normed_product[Strips], rstd;
    };

    int64_t read, write;  // the lane's first column of the next token to be read, and of the one that arrives
    int64_t token;        // the next to be read
    float gain[Strips], weighted[Strips];
    Columns now, next;
    bool exists;

    static __device__ __forceinline__ int index(int width, int to, int from) { return from * width + to; }

    template <class Sweeper>
    __device__ __forceinline__ void begin(const Arguments& args, const Sweeper& sweeper) {
        const RowPlace& place = sweeper.place;
        const Span& span = args.sweep.span;
        exists = place.row < runs(span);
        token = exists ? first_token(span, place.row) + span.tokens - 1 : 0;
        read = write = token * place.width + place.first;
        fetch(args, place, true);
        float carry[Strips];
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const bool has = exists && place.owns(s);
            gain[s] = has ? args.sweep.ln_weight[place.column(s)] : 0.0f;
            carry[s] = has ? args.sweep.last[place.row * place.width + place.column(s)] : 0.0f;
        }
        enter(args, place, carry);
    }

    __device__ __forceinline__ void fetch(const Arguments& args, const RowPlace& place, bool more) {
        next = {};
        if (!more || !exists) return;
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            if (!place.owns(s)) continue;
            const int64_t at = read + 32 * s;
            next.outer[s] = args.sweep.outer[at];
            next.slope[s] = args.sweep.slope[at];
            next.normed[s] = args.sweep.normed[at];
            next.slope_product[s] = args.sweep.slope_product[at];
            next.normed_product[s] = args.sweep.normed_product[at];
        }
        next.rstd = args.sweep.rstd[token];
        read -= place.width;
        token -= 1;
    }

    // The gradient of the output at the token that was read, which is now the present one.
    __device__ __forceinline__ void enter(const Arguments& args, const RowPlace& place, const float (&carry)[Strips]) {
        now = next;
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const float total = now.outer[s] + carry[s];
            weighted[s] = total * gain[s];
            if (exists && place.owns(s)) args.sweep.total[write + 32 * s] = total;
        }
    }

    __device__ __forceinline__ RowDeparture<Strips> departure() const {
        RowDeparture<Strips> departure{};
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            departure.value[s] = now.slope[s] * weighted[s];
            departure.first += weighted[s];
            departure.second = fmaf(weighted[s], now.normed[s], departure.second);
        }
        return departure;
    }

    __device__ __forceinline__ void arrive(const Arguments& args, const RowPlace& place,
                                           const RowArrival<Strips>& arrival, bool more) {
        const float share = 1.0f / place.width;
        const float mean = arrival.first_sum * share, mean_normed = arrival.second_sum * share;
        float carry[Strips];
#pragma unroll
        for (int s = 0; s < Strips; s++) {
            const float gradient = layer_norm_gradient(weighted[s], now.normed[s], mean, mean_normed, now.rstd);
            const float removed = fmaf(mean, now.slope_product[s], mean_normed * now.normed_product[s]);
            carry[s] = fmaf(arrival.product[s] - removed, now.rstd, gradient);
            if (exists && place.owns(s)) args.sweep.change[write + 32 * s] = gradient * now.slope[s];
        }
        write -= place.width;
        if (more) {
            enter(args, place, carry);
        } else {
#pragma unroll
            for (int s = 0; s < Strips; s++)
                if (exists && place.owns(s)) args.sweep.start[place.row * place.width + place.column(s)] = carry[s];
        }
    }

    __device__ __forceinline__ void finish(const Arguments&, const RowPlace&) const {}
};

}  // namespace newllm
