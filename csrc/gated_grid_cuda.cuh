// The gated cell without clusters: any widths, any number of hidden layers.
#pragma once

#include "sweep_grid_cuda.cuh"

namespace newllm {

struct GatedForwardGrid {
    using Sweep = GatedForward;

    static __host__ __device__ GridSizes sizes(const Sweep& sweep, int blocks, bool half) {
        const int64_t context = most(sweep.width, blocks), hidden = most(sweep.hidden, blocks);
        const int64_t matrices = hidden * even(sweep.width) +
                                 (sweep.deeper * hidden + kGates * context) * even(sweep.hidden);
        const int64_t kept = 2 * aligned(sweep.width * sizeof(float)) + matrices * (half ? 2 : 4);
        return {even(larger(sweep.width, sweep.hidden)), 0, int(context), int(larger(hidden, kGates * context)), kept};
    }

    template <class Member>
    static __device__ void run(Member& member) {
        const Sweep& sweep = member.sweep;
        const int width = sweep.width, hidden = sweep.hidden;
        const int64_t tokens = sweep.span.tokens;
        const float part = 1.0f / width;
        const GridShare own = member.share(width), own_hidden = member.share(hidden);
        const float* const gain = member.keep(sweep.ln_weight, width);
        const float* const shift = member.keep(sweep.ln_bias, width);
        const GridMatrix enter = member.keep(sweep.weight_c, 1, hidden, 1, width);
        const GridMatrix gates = member.keep(sweep.weight_gate, kGates, width, 1, hidden);
        const GridMatrix deeper = member.keep(sweep.weight_h, sweep.deeper, hidden, 1, hidden);
        member.each_of_all(width, [&](int row, int k) {
            const float context = sweep.start[(member.first + row) * width + k];
            member.input(row)[k] = context;
            if (own.has(k)) member.column(row)[k - own.first] = context;
        });
        const auto rectified = [&](int row, int output, const float* sums, float bias) {
            const float x = sums[0] + bias;
            member.post(row, own_hidden.first + output, x < 0.0f ? 0.0f : x);  // NaN stays
        };
        for (int64_t step = 0; step < tokens; step++) {
            const auto drive = [&](int row, int output) {
                return sweep.drive[member.token(row, step) * hidden + own_hidden.first + output];
            };
            const float early = member.early(own_hidden.count, drive);
            if (step > 0) arrive(member, step - 1, part, own, gain, shift);
            member.multiply(enter, 0, 1, own_hidden.count, 1, width);
            member.template finish<1>(own_hidden.count, early, drive, rectified);
            for (int64_t layer = 0; layer < sweep.deeper; layer++) {
                const auto bias = [&](int, int output) {
                    return sweep.bias_h[layer * hidden + own_hidden.first + output];
                };
                const float early = member.early(own_hidden.count, bias);
                member.receive(hidden);
                member.multiply(deeper, layer, 1, own_hidden.count, 1, hidden);
                member.template finish<1>(own_hidden.count, early, bias, rectified);
            }
            member.receive(hidden);
            member.multiply(gates, 0, kGates, own.count, 1, hidden);
            const auto nothing = [](int, int) { return 0.0f; };
            member.template finish<kGates>(
                own.count, 0.0f, nothing, [&](int row, int output, const float* sums, float) {
                    const float* const bias = sweep.bias_gate + own.first + output;
                    member.post(row, own.first + output,
                                gated_update(member.column(row)[output], sums[0] + bias[0], sums[1] + bias[width],
                                             sums[2] + bias[2 * width]));
                });
        }
        arrive(member, tokens - 1, part, own, gain, shift);
    }

    template <class Member>
    static __device__ void arrive(Member& member, int64_t step, float part, const GridShare& own, const float* gain,
                                  const float* shift) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width;
        member.receive(width);
        member.normalise(width, part, [&](int row, int k, float normed) {
            const float free = fmaf(normed, gain[k], shift[k]);
            const float context = free > sweep.clamp ? sweep.clamp : free < -sweep.clamp ? -sweep.clamp : free;
            if (!own.has(k)) return context;
            member.column(row)[k - own.first] = context;
            sweep.outputs[member.token(row, step) * width + k] = context;
            if (step == sweep.span.tokens - 1) sweep.last[(member.first + row) * width + k] = context;
            return context;
        });
    }
};

// The matrices are transposed, the gates' to [H, 3, C].
struct GatedAdjointGrid {
    using Sweep = GatedAdjoint;

    static __host__ __device__ GridSizes sizes(const Sweep& sweep, int blocks, bool half) {
        const int64_t context = most(sweep.width, blocks), hidden = most(sweep.hidden, blocks);
        const int width = even(sweep.width), gates = kGates * width;
        const int64_t matrices = hidden * gates + (sweep.deeper * hidden + context) * even(sweep.hidden);
        const int64_t kept = aligned(width * sizeof(float)) + matrices * (half ? 2 : 4);
        return {larger(gates, even(sweep.hidden)), 3 * width + gates, int(context), int(larger(hidden, context)), kept};
    }

    template <class Member>
    static __device__ void run(Member& member) {
        const Sweep& sweep = member.sweep;
        const int width = sweep.width, hidden = sweep.hidden;
        const float part = 1.0f / width;
        const int64_t layers = sweep.deeper + 1, last_step = sweep.span.tokens - 1;
        const GridShare own = member.share(width), own_hidden = member.share(hidden);
        const float* const gain = member.keep(sweep.ln_weight, width);
        const GridMatrix gates = member.keep(sweep.weight_gate, 1, hidden, kGates, width);
        const GridMatrix leave = member.keep(sweep.weight_c, 1, width, 1, hidden);
        const GridMatrix deeper = member.keep(sweep.weight_h, sweep.deeper, hidden, 1, hidden);
        fetch_ahead(member, last_step);
        member.each_of_all(width, [&](int row, int k) {
            member.input(row)[k] = sweep.last[(member.first + row) * width + k];
        });
        for (int64_t step = last_step; step >= 0; step--) {
            through_gates(member, step, part, own, gain);
            if (step > 0) fetch_ahead(member, step - 1);
            for (int64_t layer = layers - 1; layer >= 0; layer--) {
                const auto place = [&](int row, int output) {
                    return (member.token(row, step) * layers + layer) * hidden + own_hidden.first + output;
                };
                const auto made = [&](int row, int output) { return sweep.hidden_output[place(row, output)]; };
                const float early = member.early(own_hidden.count, made);
                if (layer == layers - 1) {
                    member.multiply(gates, 0, 1, own_hidden.count, kGates, width);
                } else {
                    member.receive(hidden);
                    member.multiply(deeper, layer, 1, own_hidden.count, 1, hidden);
                }
                member.template finish<1>(
                    own_hidden.count, early, made, [&](int row, int output, const float* sums, float made) {
                        const float change = made <= 0.0f ? 0.0f : sums[0];
                        sweep.hidden_change[place(row, output)] = change;
                        member.post(row, own_hidden.first + output, change);
                    });
            }
            const auto forget = [&](int row, int output) {
                return sweep.forget[member.token(row, step) * width + own.first + output];
            };
            const float early = member.early(own.count, forget);
            member.receive(hidden);
            member.multiply(leave, 0, 1, own.count, 1, hidden);
            member.template finish<1>(
                own.count, early, forget, [&](int row, int output, const float* sums, float forget) {
                    const float carry = fmaf(member.column(row)[output], forget, sums[0]);
                    if (step > 0) member.post(row, own.first + output, carry);
                    else sweep.start[(member.first + row) * width + own.first + output] = carry;
                });
            if (step > 0) member.receive(width);
        }
    }

    // What is fetched ahead: outer, normed, inside, and the gates' slopes.
    template <class Member>
    static __device__ void fetch_ahead(const Member& member, int64_t step) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, apart = even(width);
        member.each_of_all(int(width), [&](int row, int k) {
            const int64_t token = member.token(row, step), from = token * width + k;
            float* const to = member.ahead(row) + k;
            copy_ahead(to, sweep.outer + from);
            copy_ahead(to + apart, sweep.normed + from);
            if (sweep.inside != nullptr) copy_ahead(to + 2 * apart, sweep.inside + from);
            for (int g = 0; g < kGates; g++)
                copy_ahead(to + (3 + g) * apart, sweep.gate_slope + (token * kGates + g) * width + k);
        });
    }

    // The gradients of what the layer norm read, and of what the gates' functions read, which become the inputs.
    template <class Member>
    static __device__ void through_gates(Member& member, int64_t step, float part, const GridShare& own,
                                         const float* gain) {
        const Sweep& sweep = member.sweep;
        const int width = sweep.width, apart = even(width);
        float rstd[Member::kMostRows] = {};
#pragma unroll
        for (int row = 0; row < Member::kMostRows; row++)
            if (member.exists(row)) rstd[row] = sweep.rstd[member.token(row, step)];
        await_copies();
        member.each_of_all(width, [&](int row, int k) {
            float& x = member.input(row)[k];
            float total = member.ahead(row)[k] + x;
            if (sweep.inside != nullptr) total *= member.ahead(row)[2 * apart + k];
            if (own.has(k)) sweep.total[member.token(row, step) * width + k] = total;
            x = total * gain[k];
        });
        const auto normed = [&](int row, int k) { return member.ahead(row)[apart + k]; };
        member.normalise_gradient(width, part, rstd, normed, [&](int row, int k, float gradient) {
            if (own.has(k)) member.column(row)[k - own.first] = gradient;
            const int64_t token = member.token(row, step);
            for (int g = 0; g < kGates; g++) {
                const float change = gradient * member.ahead(row)[(3 + g) * apart + k];
                member.input(row)[g * apart + k] = change;
                if (own.has(k)) sweep.gate_change[(token * kGates + g) * width + k] = change;
            }
        });
    }
};

}  // namespace newllm
