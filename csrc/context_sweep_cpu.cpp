// The sweep of the context cell on a CPU, compiled once for each instruction set (see cpu_vector.h).
//
// Every member of the team owns a share of the columns, and its share of the weights stays in its own cache.
#include "cpu_norm.h"

namespace newllm {
namespace {

struct ForwardTask {
    const ContextForward& sweep;
    int64_t rows, width, layers;
    Workspace workspace;
    Tokens tokens;
    Common contexts;
    Rows update[2], gain, shift;
    Sums sums;
    float* weights;

    ForwardTask(const ContextForward& sweep, int threads)
        : sweep(sweep), rows(sweep.span.rows()), width(sweep.width), layers(sweep.layers),
          tokens(workspace, sweep.span), contexts(workspace, rows, width, threads),
          update{Rows(workspace, rows, width), Rows(workspace, rows, width)},
          gain(workspace, layers, width), shift(workspace, layers, width), sums(workspace, rows, threads),
          weights(Packed::storage(workspace, layers, width, width)) {
        gain.read({0, padded(width)}, layers, sweep.ln_weight, width);
        shift.read({0, padded(width)}, layers, sweep.ln_bias, width);
    }

    Packed weight(int64_t layer) const { return Packed(weights, layer, width, width); }

    int64_t at(int64_t row, int64_t step, int64_t layer) const {
        return (tokens(row, step) * layers + layer) * width;
    }

    void run(const Member& member) const {
        const Columns own = share(width, member), columns = contexts.columns(own, width);
        const Rows context = contexts.of(member);
        for (int64_t layer = 0; layer < layers; ++layer)
            weight(layer).fill(own, static_cast<const float*>(sweep.weight) + layer * width * width, width,
                               width, width, 1);
        context.read(columns, rows, sweep.start, width);
        contexts.wait(member);
        int turn = 0;
        for (int64_t step = 0; step < sweep.span.tokens; ++step)
            for (int64_t layer = 0; layer < layers; ++layer, turn ^= 1) {
                change(step, layer, turn, own, context, member);
                member.wait();
                norm(step, layer, turn, own, columns, context, member);
                contexts.wait(member);
            }
        context.write(own, rows, sweep.last, width);
    }

    // u and its moments in the own columns.
    void change(int64_t step, int64_t layer, int turn, Columns own, const Rows& context,
                const Member& member) const {
        const Rows& u = update[turn];
        multiply(weight(layer), own, rows, context.data, context.stride, u.data, u.stride);
        for (int64_t row = 0; row < rows; ++row) {
            const float* drive = sweep.drive + at(row, step, layer);
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                const Vector read = load(u[row] + column) + load(drive + column, width - column);
                store(u[row] + column, context_update(load(context[row] + column), read));
            }
            sums.at(turn, row, member.index) = own_moments(u[row], own, width);
        }
    }

    void norm(int64_t step, int64_t layer, int turn, Columns own, Columns columns, const Rows& context,
              const Member& member) const {
        each_normed(update[turn], sums, turn, rows, columns, width, member.size,
                    [&](int64_t row, int64_t column, Vector normed) {
                        const Vector next = normed * load(gain[layer] + column) + load(shift[layer] + column);
                        store(context[row] + column, next);
                        if (column >= own.begin && column < own.end)
                            store(sweep.outputs + at(row, step, layer) + column, next, width - column);
                    });
    }
};

struct AdjointTask {
    const ContextAdjoint& sweep;
    int64_t rows, width, layers;
    Workspace workspace;
    Tokens tokens;
    Common changes;
    Rows weighted[2], carry, product, gain;
    Sums sums;
    float* weights;

    AdjointTask(const ContextAdjoint& sweep, int threads)
        : sweep(sweep), rows(sweep.span.rows()), width(sweep.width), layers(sweep.layers),
          tokens(workspace, sweep.span), changes(workspace, rows, width, threads),
          weighted{Rows(workspace, rows, width), Rows(workspace, rows, width)},
          carry(workspace, rows, width), product(workspace, rows, width), gain(workspace, layers, width),
          sums(workspace, rows, threads), weights(Packed::storage(workspace, layers, width, width)) {
        gain.read({0, padded(width)}, layers, sweep.ln_weight, width);
    }

    Packed weight(int64_t layer) const { return Packed(weights, layer, width, width); }

    int64_t index(int64_t row, int64_t step, int64_t layer) const {
        return tokens(row, step) * layers + layer;
    }

    void run(const Member& member) const {
        const Columns own = share(width, member), columns = changes.columns(own, width);
        const Rows change = changes.of(member);
        for (int64_t layer = 0; layer < layers; ++layer)
            weight(layer).fill(own, static_cast<const float*>(sweep.weight) + layer * width * width, width,
                               width, 1, width);
        carry.read(own, rows, sweep.last, width);
        int turn = 0;
        for (int64_t step = sweep.span.tokens - 1; step >= 0; --step)
            for (int64_t layer = layers - 1; layer >= 0; --layer, turn ^= 1) {
                gather(step, layer, turn, own, member);
                member.wait();
                through_norm(step, layer, turn, own, columns, change, member);
                changes.wait(member);
                multiply(weight(layer), own, rows, change.data, change.stride, product.data, product.stride);
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t column = own.begin; column < own.end; column += LANES)
                        store(carry[row] + column, load(carry[row] + column) + load(product[row] + column));
            }
        carry.write(own, rows, sweep.start, width);
    }

    // The whole gradient of the layer's result in the own columns, and its sums for the layer norm.
    void gather(int64_t step, int64_t layer, int turn, Columns own, const Member& member) const {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = index(row, step, layer) * width;
            float* target = weighted[turn][row];
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                const int64_t left = width - column;
                const Vector whole = load(carry[row] + column) + load(sweep.outer + at + column, left);
                store(sweep.total + at + column, whole, left);
                store(target + column, whole * load(gain[layer] + column));
            }
            sums.at(turn, row, member.index) = own_slopes(target, sweep.normed + at, own, width);
        }
    }

    void through_norm(int64_t step, int64_t layer, int turn, Columns own, Columns columns, const Rows& change,
                      const Member& member) const {
        const auto at = [&](int64_t row) { return index(row, step, layer); };
        each_gradient(weighted[turn], sums, turn, rows, columns, width, member.size, sweep.normed, sweep.rstd, at,
                      [&](int64_t row, int64_t column, Vector du) {
                          const int64_t place = at(row) * width + column, left = width - column;
                          const Vector inner = du * load(sweep.slope + place, left);
                          store(change[row] + column, inner);
                          if (column < own.begin || column >= own.end) return;
                          store(sweep.change + place, inner, left);
                          store(carry[row] + column, du);
                      });
    }
};

}  // namespace

namespace NEWLLM_ISA {

void context_forward(const ContextForward& sweep, int threads) {
    run_sweep<ForwardTask>(sweep, threads, sweep.span.rows() * sweep.width * sweep.width);
}

void context_adjoint(const ContextAdjoint& sweep, int threads) {
    run_sweep<AdjointTask>(sweep, threads, sweep.span.rows() * sweep.width * sweep.width);
}

}  // namespace NEWLLM_ISA
}  // namespace newllm
