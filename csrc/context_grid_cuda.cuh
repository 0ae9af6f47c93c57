// The context cell without clusters: any width, any number of layers.
#pragma once

#include "sweep_grid_cuda.cuh"

namespace newllm {

struct ContextForwardGrid {
    using Sweep = ContextForward;

    static int64_t shared(const Sweep& sweep) { return sweep.width; }  // floats of a row

    template <class Member>
    static __device__ void run(Member& member, float* context) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, layers = sweep.layers, stages = sweep.span.tokens * layers;
        member.each(width, [&](int row, int64_t i) {
            context[row * width + i] = sweep.start[(member.first + row) * width + i];
        });
        for (int64_t stage = 0; stage < stages; stage++) {
            const int64_t step = stage / layers, layer = stage % layers;
            member.template multiply<1>(
                sweep.weight, layer * width * width, width, width, context, [&](int row, int64_t i, const float* sum) {
                    const float drive = sweep.drive[(member.token(row, step) * layers + layer) * width + i];
                    member.buffer(stage % 2, row)[i] = context_update(context[row * width + i], sum[0] + drive);
                });
            member.wait();
            arrive(member, stage, context);
        }
        member.each(width, [&](int row, int64_t i) {
            if (member.writes(i)) sweep.last[(member.first + row) * width + i] = context[row * width + i];
        });
    }

    template <class Member>
    static __device__ void arrive(const Member& member, int64_t stage, float* context) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, layers = sweep.layers, step = stage / layers, layer = stage % layers;
        member.each(width, [&](int row, int64_t i) {
            context[row * width + i] = load_fresh(member.buffer(stage % 2, row) + i);
        });
        layer_norm_rows(member, context, width, sweep.ln_weight + layer * width, sweep.ln_bias + layer * width);
        member.each(width, [&](int row, int64_t i) {
            if (member.writes(i))
                sweep.outputs[(member.token(row, step) * layers + layer) * width + i] = context[row * width + i];
        });
    }
};

// The matrices are transposed.
struct ContextAdjointGrid {
    using Sweep = ContextAdjoint;

    static int64_t shared(const Sweep& sweep) { return 2 * sweep.width; }

    template <class Member>
    static __device__ void run(Member& member, float* shared) {
        const Sweep& sweep = member.sweep;
        const int64_t width = sweep.width, layers = sweep.layers, stages = sweep.span.tokens * layers;
        float *const gradient = shared, *const change = shared + member.team.rows * width;
        for (int64_t stage = stages - 1; stage >= 0; stage--) {
            const int64_t layer = stage % layers;
            const auto place = [&](int row) { return member.token(row, stage / layers) * layers + layer; };
            member.each(width, [&](int row, int64_t i) {
                const float carry = stage == stages - 1 ? sweep.last[(member.first + row) * width + i]
                                                        : load_fresh(member.buffer((stage + 1) % 2, row) + i);
                const float total = sweep.outer[place(row) * width + i] + carry;
                gradient[row * width + i] = total;
                if (member.writes(i)) sweep.total[place(row) * width + i] = total;
            });
            layer_norm_rows_gradient(member, gradient, width, sweep.ln_weight + layer * width, sweep.normed,
                                     sweep.rstd, place);
            member.each(width, [&](int row, int64_t i) {
                const float own = gradient[row * width + i] * sweep.slope[place(row) * width + i];
                change[row * width + i] = own;
                if (member.writes(i)) sweep.change[place(row) * width + i] = own;
            });
            member.template multiply<1>(sweep.weight, layer * width * width, width, width, change,
                                        [&](int row, int64_t i, const float* sum) {
                                            const float carry = gradient[row * width + i] + sum[0];
                                            member.buffer(stage % 2, row)[i] = carry;
                                            if (stage == 0) sweep.start[(member.first + row) * width + i] = carry;
                                        });
            member.wait();
        }
    }
};

}  // namespace newllm
