// The gated cell without clusters: any widths, any number of hidden layers.
#pragma once

#include "sweep_grid_cuda.cuh"

namespace newllm {

constexpr int kGates = 3;

struct GatedForwardGrid {
    using Sweep = GatedForward;

    static int64_t shared(const Sweep& sweep) { return sweep.width + sweep.hidden; }

    template <class Member>
    static __device__ void run(Member& member, float* shared) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, hidden = sweep.hidden;
        float *const context = shared, *const layer = shared + member.team.rows * width;
        member.each(width, [&](int row, int64_t i) {
            context[row * width + i] = sweep.start[(member.first + row) * width + i];
        });
        int turn = 0;  // of the buffers, for what is written next
        for (int64_t step = 0; step < sweep.span.tokens; step++) {
            member.template multiply<1>(sweep.weight_c, 0, hidden, width, context,
                                        [&](int row, int64_t i, const float* sum) {
                                            const float drive = sweep.drive[member.token(row, step) * hidden + i];
                                            member.buffer(turn, row)[i] = rectified(sum[0] + drive);
                                        });
            read(member, turn, layer);
            for (int64_t depth = 0; depth < sweep.deeper; depth++) {
                member.template multiply<1>(sweep.weight_h, depth * hidden * hidden, hidden, hidden, layer,
                                            [&](int row, int64_t i, const float* sum) {
                                                const float bias = sweep.bias_h[depth * hidden + i];
                                                member.buffer(turn, row)[i] = rectified(sum[0] + bias);
                                            });
                read(member, turn, layer);
            }
            member.template multiply<kGates>(
                sweep.weight_gate, 0, width, hidden, layer, [&](int row, int64_t i, const float* sum) {
                    const float* const bias = sweep.bias_gate + i;
                    member.buffer(turn, row)[i] = gated_update(context[row * width + i], sum[0] + bias[0],
                                                               sum[1] + bias[width], sum[2] + bias[2 * width]);
                });
            member.wait();
            arrive(member, step, turn, context);
            turn ^= 1;
        }
        member.each(width, [&](int row, int64_t i) {
            if (member.writes(i)) sweep.last[(member.first + row) * width + i] = context[row * width + i];
        });
    }

    static __device__ float rectified(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

    template <class Member>
    static __device__ void read(Member& member, int& turn, float* layer) {
        const int64_t hidden = member.sweep.hidden;
        member.wait();
        member.each(hidden, [&](int row, int64_t i) {
            layer[row * hidden + i] = load_fresh(member.buffer(turn, row) + i);
        });
        turn ^= 1;
    }

    template <class Member>
    static __device__ void arrive(const Member& member, int64_t step, int turn, float* context) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width;
        member.each(width, [&](int row, int64_t i) {
            context[row * width + i] = load_fresh(member.buffer(turn, row) + i);
        });
        layer_norm_rows(member, context, width, sweep.ln_weight, sweep.ln_bias);
        member.each(width, [&](int row, int64_t i) {
            float& own = context[row * width + i];
            own = own > sweep.clamp ? sweep.clamp : own < -sweep.clamp ? -sweep.clamp : own;
            if (member.writes(i)) sweep.outputs[member.token(row, step) * width + i] = own;
        });
    }
};

// The matrices are transposed, the gates' to [H, 3, C].
struct GatedAdjointGrid {
    using Sweep = GatedAdjoint;

    static int64_t shared(const Sweep& sweep) {
        return sweep.width + (kGates * sweep.width > sweep.hidden ? kGates * sweep.width : sweep.hidden);
    }

    template <class Member>
    static __device__ void run(Member& member, float* shared) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, hidden = sweep.hidden, layers = sweep.deeper + 1;
        float *const gradient = shared, *const change = shared + member.team.rows * width;
        for (int64_t step = sweep.span.tokens - 1; step >= 0; step--) {
            through_gates(member, step, gradient, change);
            for (int64_t layer = layers - 1; layer >= 0; layer--) {
                const bool last = layer == layers - 1;
                const auto place = [&](int row) { return (member.token(row, step) * layers + layer) * hidden; };
                member.template multiply<1>(
                    last ? sweep.weight_gate : sweep.weight_h, last ? 0 : layer * hidden * hidden, hidden,
                    last ? kGates * width : hidden, change, [&](int row, int64_t i, const float* sum) {
                        const bool open = !(sweep.hidden_output[place(row) + i] <= 0.0f);
                        sweep.hidden_change[place(row) + i] = open ? sum[0] : 0.0f;
                    });
                member.wait();
                member.each(hidden, [&](int row, int64_t i) {
                    change[row * hidden + i] = load_fresh(sweep.hidden_change + place(row) + i);
                });
            }
            member.template multiply<1>(sweep.weight_c, 0, width, hidden, change,
                                        [&](int row, int64_t i, const float* sum) {
                                            const float forget = sweep.forget[member.token(row, step) * width + i];
                                            const float carry = fmaf(gradient[row * width + i], forget, sum[0]);
                                            member.buffer(0, row)[i] = carry;
                                            if (step == 0) sweep.start[(member.first + row) * width + i] = carry;
                                        });
            member.wait();
        }
    }

    // The gradients of what the layer norm read, and of what the gates' functions read.
    template <class Member>
    static __device__ void through_gates(const Member& member, int64_t step, float* gradient, float* change) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width;
        const auto place = [&](int row) { return member.token(row, step); };
        member.each(width, [&](int row, int64_t i) {
            const int64_t at = place(row) * width + i;
            const float carry = step == sweep.span.tokens - 1 ? sweep.last[(member.first + row) * width + i]
                                                              : load_fresh(member.buffer(0, row) + i);
            float total = sweep.outer[at] + carry;
            if (sweep.inside != nullptr) total *= sweep.inside[at];
            gradient[row * width + i] = total;
            if (member.writes(i)) sweep.total[at] = total;
        });
        layer_norm_rows_gradient(member, gradient, width, sweep.ln_weight, sweep.normed, sweep.rstd, place);
        member.each(kGates * width, [&](int row, int64_t i) {
            const int64_t at = place(row) * kGates * width + i;
            const float own = gradient[row * width + i % width] * sweep.gate_slope[at];
            change[row * kGates * width + i] = own;
            if (member.writes(i)) sweep.gate_change[at] = own;
        });
    }
};

}  // namespace newllm
