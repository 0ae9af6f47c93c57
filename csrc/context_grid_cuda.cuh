// The context cell without clusters: any width, any number of layers.
#pragma once

#include "sweep_grid_cuda.cuh"

namespace newllm {

struct ContextForwardGrid {
    using Sweep = ContextForward;

    static __host__ __device__ GridSizes sizes(const Sweep& sweep, int blocks, bool half) {
        const int inputs = even(sweep.width), columns = most(sweep.width, blocks);
        const int64_t norms = 2 * aligned(sweep.layers * sweep.width * sizeof(float));
        const int64_t kept = norms + sweep.layers * columns * inputs * (half ? 2 : 4);
        return {inputs, 0, columns, columns, kept};
    }

    template <class Member>
    static __device__ void run(Member& member) {
        const Sweep& sweep = member.sweep;
        const int width = sweep.width, layers = sweep.layers;
        const int64_t tokens = sweep.span.tokens;
        const float part = 1.0f / width;
        const GridShare own = member.share(width);
        const float* const gain = member.keep(sweep.ln_weight, sweep.layers * width);
        const float* const shift = member.keep(sweep.ln_bias, sweep.layers * width);
        const GridMatrix weight = member.keep(sweep.weight, layers, width, 1, width);
        member.each_of_all(width, [&](int row, int k) {
            const float context = sweep.start[(member.first + row) * width + k];
            member.input(row)[k] = context;
            if (own.has(k)) member.column(row)[k - own.first] = context;
        });
        const auto arrive = [&](int64_t step, int layer) {
            member.receive(width);
            member.normalise(width, part, [&](int row, int k, float normed) {
                const float context = fmaf(normed, gain[layer * width + k], shift[layer * width + k]);
                if (!own.has(k)) return context;
                member.column(row)[k - own.first] = context;
                sweep.outputs[(member.token(row, step) * layers + layer) * width + k] = context;
                if (step == tokens - 1 && layer == layers - 1) sweep.last[(member.first + row) * width + k] = context;
                return context;
            });
        };
        for (int64_t step = 0; step < tokens; step++)
            for (int layer = 0; layer < layers; layer++) {
                const auto drive = [&](int row, int output) {
                    return sweep.drive[(member.token(row, step) * layers + layer) * width + own.first + output];
                };
                const float early = member.early(own.count, drive);
                if (layer > 0) arrive(step, layer - 1);
                else if (step > 0) arrive(step - 1, layers - 1);
                member.multiply(weight, layer, 1, own.count, 1, width);
                member.template finish<1>(
                    own.count, early, drive, [&](int row, int output, const float* sums, float drive) {
                        const float context = member.column(row)[output];
                        member.post(row, own.first + output, context_update(context, sums[0] + drive));
                    });
            }
        arrive(tokens - 1, layers - 1);
    }
};

// The matrices are transposed.
struct ContextAdjointGrid {
    using Sweep = ContextAdjoint;

    static __host__ __device__ GridSizes sizes(const Sweep& sweep, int blocks, bool half) {
        const int inputs = even(sweep.width), columns = most(sweep.width, blocks);
        const int64_t norms = aligned(sweep.layers * sweep.width * sizeof(float));
        const int64_t kept = norms + sweep.layers * columns * inputs * (half ? 2 : 4);
        return {inputs, 3 * inputs, columns, columns, kept};
    }

    template <class Member>
    static __device__ void run(Member& member) {
        const Sweep& sweep = member.sweep;
        const int width = sweep.width, layers = sweep.layers, apart = even(width);
        const int64_t stages = sweep.span.tokens * layers;
        const float part = 1.0f / width;
        const GridShare own = member.share(width);
        const float* const gain = member.keep(sweep.ln_weight, sweep.layers * width);
        const GridMatrix weight = member.keep(sweep.weight, layers, width, 1, width);
        const auto place = [&](int row, int64_t stage) {
            return member.token(row, stage / layers) * layers + stage % layers;
        };
        const auto outer = [&](int row) { return member.ahead(row); };
        const auto slope = [&](int row) { return member.ahead(row) + apart; };
        const auto normed = [&](int row, int k) { return member.ahead(row)[2 * apart + k]; };
        const auto fetch_ahead = [&](int64_t stage) {
            member.each_of_all(width, [&](int row, int k) {
                const int64_t from = place(row, stage) * width + k;
                copy_ahead(outer(row) + k, sweep.outer + from);
                copy_ahead(slope(row) + k, sweep.slope + from);
                copy_ahead(member.ahead(row) + 2 * apart + k, sweep.normed + from);
            });
        };
        fetch_ahead(stages - 1);
        member.each_of_all(width, [&](int row, int k) {
            member.input(row)[k] = sweep.last[(member.first + row) * width + k];
        });
        for (int64_t stage = stages - 1; stage >= 0; stage--) {
            const int layer = static_cast<int>(stage % layers);
            float rstd[Member::kMostRows] = {};
#pragma unroll
            for (int row = 0; row < Member::kMostRows; row++)
                if (member.exists(row)) rstd[row] = sweep.rstd[place(row, stage)];
            if (stage < stages - 1) member.receive(width);
            await_copies();
            member.each_of_all(width, [&](int row, int k) {
                float& x = member.input(row)[k];
                const float total = outer(row)[k] + x;
                if (own.has(k)) sweep.total[place(row, stage) * width + k] = total;
                x = total * gain[layer * width + k];
            });
            member.normalise_gradient(width, part, rstd, normed, [&](int row, int k, float gradient) {
                const float change = gradient * slope(row)[k];
                member.input(row)[k] = change;
                if (!own.has(k)) return;
                member.column(row)[k - own.first] = gradient;
                sweep.change[place(row, stage) * width + k] = change;
            });
            if (stage > 0) fetch_ahead(stage - 1);
            member.multiply(weight, layer, 1, own.count, 1, width);
            const auto nothing = [](int, int) { return 0.0f; };
            member.template finish<1>(own.count, 0.0f, nothing, [&](int row, int output, const float* sums, float) {
                const float carry = member.column(row)[output] + sums[0];
                if (stage > 0) member.post(row, own.first + output, carry);
                else sweep.start[(member.first + row) * width + own.first + output] = carry;
            });
        }
    }
};

}  // namespace newllm
