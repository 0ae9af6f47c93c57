// The sweep of the gated cell on a CPU, compiled once for each instruction set (see cpu_vector.h).
#include "cpu_norm.h"

namespace newllm {
namespace {

constexpr int GATES = 3;

struct ForwardTask {
    const GatedForward& sweep;
    int64_t rows, width, hidden, deeper;
    Workspace workspace;
    Tokens tokens;
    Common contexts;
    Rows layers[2], update[2], gates, gain, shift, gate_bias, hidden_bias;
    Sums sums;
    float *first_weight, *deeper_weights, *gate_weights;

    ForwardTask(const GatedForward& sweep, int threads)
        : sweep(sweep), rows(sweep.span.rows()), width(sweep.width), hidden(sweep.hidden), deeper(sweep.deeper),
          tokens(workspace, sweep.span), contexts(workspace, rows, width, threads),
          layers{Rows(workspace, rows, hidden), Rows(workspace, rows, hidden)},
          update{Rows(workspace, rows, width), Rows(workspace, rows, width)},
          gates(workspace, GATES * rows, width), gain(workspace, 1, width), shift(workspace, 1, width),
          gate_bias(workspace, GATES, width), hidden_bias(workspace, deeper, hidden),
          sums(workspace, rows, threads), first_weight(Packed::storage(workspace, 1, hidden, width)),
          deeper_weights(Packed::storage(workspace, deeper, hidden, hidden)),
          gate_weights(Packed::storage(workspace, GATES, width, hidden)) {
        const Columns all = {0, padded(width)};
        gain.read(all, 1, sweep.ln_weight, width);
        shift.read(all, 1, sweep.ln_bias, width);
        gate_bias.read(all, GATES, sweep.bias_gate, width);
        hidden_bias.read({0, padded(hidden)}, deeper, sweep.bias_h, hidden);
    }

    Packed weight(int64_t layer) const {
        if (layer == 0) return Packed(first_weight, 0, hidden, width);
        return Packed(deeper_weights, layer - 1, hidden, hidden);
    }

    Packed gate_weight(int64_t gate) const { return Packed(gate_weights, gate, width, hidden); }

    void pack(Columns own, Columns own_hidden) const {
        weight(0).fill(own_hidden, static_cast<const float*>(sweep.weight_c), hidden, width, width, 1);
        for (int64_t layer = 0; layer < deeper; ++layer)
            weight(layer + 1).fill(own_hidden,
                                   static_cast<const float*>(sweep.weight_h) + layer * hidden * hidden, hidden,
                                   hidden, hidden, 1);
        for (int64_t gate = 0; gate < GATES; ++gate)
            gate_weight(gate).fill(own, static_cast<const float*>(sweep.weight_gate) + gate * width * hidden,
                                   width, hidden, hidden, 1);
    }

    void run(const Member& member) const {
        const Columns own = share(width, member), own_hidden = share(hidden, member);
        const Columns columns = contexts.columns(own, width);
        const Rows context = contexts.of(member);
        pack(own, own_hidden);
        context.read(columns, rows, sweep.start, width);
        contexts.wait(member);
        for (int64_t step = 0; step < sweep.span.tokens; ++step) {
            const int turn = step % 2;
            for (int64_t layer = 0; layer <= deeper; ++layer) {
                network(step, layer, own_hidden, layer == 0 ? context : layers[(layer - 1) % 2]);
                member.wait();
            }
            update_own(turn, own, context, member);
            member.wait();
            norm(step, turn, own, columns, context, member);
            contexts.wait(member);
        }
        context.write(own, rows, sweep.last, width);
    }

    // The own columns of one hidden layer.
    void network(int64_t step, int64_t layer, Columns own, const Rows& from) const {
        const Rows& to = layers[layer % 2];
        multiply(weight(layer), own, rows, from.data, from.stride, to.data, to.stride);
        for (int64_t row = 0; row < rows; ++row) {
            const float* drive = sweep.drive + tokens(row, step) * hidden;
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                const Vector added = layer == 0 ? load(drive + column, hidden - column)
                                                : load(hidden_bias[layer - 1] + column);
                store(to[row] + column, at_least(load(to[row] + column) + added, 0.0f));
            }
        }
    }

    // u and its moments in the own columns.
    void update_own(int turn, Columns own, const Rows& context, const Member& member) const {
        const Rows &from = layers[deeper % 2], &u = update[turn];
        for (int64_t gate = 0; gate < GATES; ++gate)
            multiply(gate_weight(gate), own, rows, from.data, from.stride, gates[gate * rows], gates.stride);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                Vector read[GATES];
                for (int gate = 0; gate < GATES; ++gate)
                    read[gate] = load(gates[gate * rows + row] + column) + load(gate_bias[gate] + column);
                store(u[row] + column,
                      gated_update(load(context[row] + column), read[0], read[1], read[2]));
            }
            sums.at(turn, row, member.index) = own_moments(u[row], own, width);
        }
    }

    void norm(int64_t step, int turn, Columns own, Columns columns, const Rows& context,
              const Member& member) const {
        each_normed(update[turn], sums, turn, rows, columns, width, member.size,
                    [&](int64_t row, int64_t column, Vector normed) {
                        Vector next = normed * load(gain[0] + column) + load(shift[0] + column);
                        next = at_least(at_most(next, sweep.clamp), -sweep.clamp);
                        store(context[row] + column, next);
                        if (column >= own.begin && column < own.end)
                            store(sweep.outputs + tokens(row, step) * width + column, next,
                                  width - column);
                    });
    }
};

struct AdjointTask {
    const GatedAdjoint& sweep;
    int64_t rows, width, hidden, deeper, gate_width;
    Workspace workspace;
    Tokens tokens;
    Common changes;
    Rows weighted[2], carry, product, layers[2], gain;
    Sums sums;
    float *first_weight, *deeper_weights, *gate_weight;

    AdjointTask(const GatedAdjoint& sweep, int threads)
        : sweep(sweep), rows(sweep.span.rows()), width(sweep.width), hidden(sweep.hidden), deeper(sweep.deeper),
          gate_width(GATES * padded(width)), tokens(workspace, sweep.span),
          changes(workspace, rows, gate_width, threads),
          weighted{Rows(workspace, rows, width), Rows(workspace, rows, width)}, carry(workspace, rows, width),
          product(workspace, rows, width),
          layers{Rows(workspace, rows, hidden), Rows(workspace, rows, hidden)}, gain(workspace, 1, width),
          sums(workspace, rows, threads), first_weight(Packed::storage(workspace, 1, width, hidden)),
          deeper_weights(Packed::storage(workspace, deeper, hidden, hidden)),
          gate_weight(Packed::storage(workspace, 1, hidden, gate_width)) {
        gain.read({0, padded(width)}, 1, sweep.ln_weight, width);
    }

    // From hidden layer `layer` to what it read.
    Packed weight(int64_t layer) const {
        if (layer == 0) return Packed(first_weight, 0, width, hidden);
        return Packed(deeper_weights, layer - 1, hidden, hidden);
    }

    // From all gates to the last hidden layer.
    Packed gate_weights() const { return Packed(gate_weight, 0, hidden, gate_width); }

    void pack(Columns own, Columns own_hidden) const {
        weight(0).fill(own, static_cast<const float*>(sweep.weight_c), width, hidden, 1, width);
        for (int64_t layer = 0; layer < deeper; ++layer)
            weight(layer + 1).fill(own_hidden,
                                   static_cast<const float*>(sweep.weight_h) + layer * hidden * hidden, hidden,
                                   hidden, 1, hidden);
        for (int64_t gate = 0; gate < GATES; ++gate)
            gate_weights().fill(own_hidden, static_cast<const float*>(sweep.weight_gate) + gate * width * hidden,
                                hidden, width, 1, hidden, gate * padded(width));
    }

    void run(const Member& member) const {
        const Columns own = share(width, member), own_hidden = share(hidden, member);
        const Columns columns = changes.columns(own, width);
        const Rows change = changes.of(member);
        pack(own, own_hidden);
        carry.read(own, rows, sweep.last, width);
        for (int64_t step = sweep.span.tokens - 1; step >= 0; --step) {
            const int turn = step % 2;
            gather(step, turn, own, member);
            member.wait();
            through_gates(step, turn, own, columns, change, member);
            changes.wait(member);
            for (int64_t layer = deeper; layer >= 0; --layer) {
                network(step, layer, own_hidden, change);
                member.wait();
            }
            multiply(weight(0), own, rows, layers[0].data, layers[0].stride, product.data, product.stride);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t column = own.begin; column < own.end; column += LANES)
                    store(carry[row] + column, load(carry[row] + column) + load(product[row] + column));
        }
        carry.write(own, rows, sweep.start, width);
    }

    // The whole gradient of the layer norm's result in the own columns, and its sums.
    void gather(int64_t step, int turn, Columns own, const Member& member) const {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = tokens(row, step) * width;
            float* target = weighted[turn][row];
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                const int64_t left = width - column;
                Vector whole = load(carry[row] + column) + load(sweep.outer + at + column, left);
                if (sweep.inside != nullptr) whole *= load(sweep.inside + at + column, left);
                store(sweep.total + at + column, whole, left);
                store(target + column, whole * load(gain[0] + column));
            }
            sums.at(turn, row, member.index) = own_slopes(target, sweep.normed + at, own, width);
        }
    }

    void through_gates(int64_t step, int turn, Columns own, Columns columns, const Rows& change,
                       const Member& member) const {
        const auto at = [&](int64_t row) { return tokens(row, step); };
        each_gradient(weighted[turn], sums, turn, rows, columns, width, member.size, sweep.normed, sweep.rstd, at,
                      [&](int64_t row, int64_t column, Vector du) {
                          const int64_t left = width - column;
                          const bool mine = column >= own.begin && column < own.end;
                          for (int64_t gate = 0; gate < GATES; ++gate) {
                              const int64_t place = (at(row) * GATES + gate) * width + column;
                              const Vector inner = du * load(sweep.gate_slope + place, left);
                              store(change[row] + gate * padded(width) + column, inner);
                              if (mine) store(sweep.gate_change + place, inner, left);
                          }
                          if (!mine) return;
                          const Vector kept = load(sweep.forget + at(row) * width + column, left);
                          store(carry[row] + column, du * kept);
                      });
    }

    // The own columns of the gradient of what hidden layer `layer` read.
    void network(int64_t step, int64_t layer, Columns own, const Rows& change) const {
        const Rows &from = layer == deeper ? change : layers[(layer + 1) % 2], &to = layers[layer % 2];
        multiply(layer == deeper ? gate_weights() : weight(layer + 1), own, rows, from.data, from.stride, to.data,
                 to.stride);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = (tokens(row, step) * (deeper + 1) + layer) * hidden;
            for (int64_t column = own.begin; column < own.end; column += LANES) {
                const Vector output = load(sweep.hidden_output + at + column, hidden - column);
                const Vector inner = output <= 0.0f ? Vector{} : load(to[row] + column);
                store(to[row] + column, inner);
                store(sweep.hidden_change + at + column, inner, hidden - column);
            }
        }
    }
};

}  // namespace

namespace NEWLLM_ISA {

void gated_forward(const GatedForward& sweep, int threads) {
    run_sweep<ForwardTask>(sweep, threads, sweep.span.rows() * sweep.width * sweep.hidden);
}

void gated_adjoint(const GatedAdjoint& sweep, int threads) {
    run_sweep<AdjointTask>(sweep, threads, sweep.span.rows() * sweep.width * sweep.hidden);
}

}  // namespace NEWLLM_ISA
}  // namespace newllm
