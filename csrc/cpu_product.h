// Products of a few rows with a matrix that stays packed: rows by panels of two vectors of outputs.
#pragma once

#include "cpu_team.h"
#include "cpu_vector.h"

namespace newllm {
namespace {

constexpr int PANEL = 2 * LANES;
// Partial sums of so many products are added up: long chains would round more than torch's products do.
constexpr int64_t CHAIN = 128;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t padded(int64_t width) { return (width + PANEL - 1) / PANEL * PANEL; }

// Columns [begin, end) of a width, in whole panels; `end` may lie in the padding.
struct Columns {
    int64_t begin, end;
};

// The share of one member.
inline Columns share(int64_t width, const Member& member) {
    const int64_t panels = padded(width) / PANEL;
    return {panels * member.index / member.size * PANEL, panels * (member.index + 1) / member.size * PANEL};
}

// A matrix of `outputs` by `inputs` in panels of PANEL outputs: [outputs / PANEL][depth][PANEL], zeros as
// padding. `depth` is inputs made up to whole panels, as are the rows that it multiplies.
struct Packed {
    float* panels;
    int64_t depth;

    // Number `place` of the matrices in `storage`.
    Packed(float* storage, int64_t place, int64_t outputs, int64_t depth)
        : panels(storage + place * padded(outputs) * padded(depth)), depth(padded(depth)) {}

    // Room for `count` matrices.
    static float* storage(Workspace& workspace, int64_t count, int64_t outputs, int64_t depth) {
        return workspace.floats(count * padded(outputs) * padded(depth));
    }

    const float* panel(int64_t column) const { return panels + column * depth; }

    // Fill the panels of `own` from element (o, i) at from[o * output_stride + i * input_stride], of which
    // there are `outputs` by `inputs`; inputs come to lie `first_input` deep.
    void fill(Columns own, const float* from, int64_t outputs, int64_t inputs, int64_t output_stride,
              int64_t input_stride, int64_t first_input = 0) const {
        constexpr int64_t BLOCK = 64;
        for (int64_t column = own.begin; column < own.end; column += PANEL) {
            float* panel = panels + column * depth + first_input * PANEL;
            for (int64_t block = 0; block < padded(inputs); block += BLOCK) {
                const int64_t end = least(block + BLOCK, padded(inputs));
                for (int64_t o = 0; o < PANEL; ++o) {
                    const float* source = from + (column + o) * output_stride;
                    const int64_t given = column + o < outputs ? least(end, inputs) : block;
                    int64_t i = block;
                    for (; i < given; ++i) panel[i * PANEL + o] = source[i * input_stride];
                    for (; i < end; ++i) panel[i * PANEL + o] = 0;
                }
            }
        }
    }
};

// COUNT rows of `in` times PANELS neighbouring panels.
template <int COUNT, int PANELS>
void multiply_tile(const Packed& matrix, int64_t column, const float* in, int64_t in_stride, float* out,
                   int64_t out_stride) {
    const int64_t depth = matrix.depth, panel_stride = depth * PANEL;
    const float* panel = matrix.panel(column);
    for (int64_t from = 0; from < depth; from += CHAIN) {
        const int64_t to = least(from + CHAIN, depth);
        Vector sums[COUNT][2 * PANELS] = {};
        for (int64_t k = from; k < to; ++k) {
            Vector weights[2 * PANELS];
            for (int v = 0; v < 2 * PANELS; ++v)
                weights[v] = load(panel + v / 2 * panel_stride + k * PANEL + v % 2 * LANES);
            for (int row = 0; row < COUNT; ++row) {
                const Vector x = all(in[row * in_stride + k]);
                for (int v = 0; v < 2 * PANELS; ++v) sums[row][v] += weights[v] * x;
            }
        }
        for (int row = 0; row < COUNT; ++row)
            for (int v = 0; v < 2 * PANELS; ++v) {
                float* target = out + row * out_stride + column + v * LANES;
                store(target, from == 0 ? sums[row][v] : load(target) + sums[row][v]);
            }
    }
}

template <int COUNT>
void multiply_rows(const Packed& matrix, Columns own, const float* in, int64_t in_stride, float* out,
                   int64_t out_stride) {
    // At least eight sums are under way at once, or each would wait for the one before; and panels from several
    // places at once come faster.
    constexpr int WIDE = COUNT <= 2 ? 4 : COUNT <= 6 ? 2 : 1;
    int64_t column = own.begin;
    for (; column + WIDE * PANEL <= own.end; column += WIDE * PANEL)
        multiply_tile<COUNT, WIDE>(matrix, column, in, in_stride, out, out_stride);
    for (; column < own.end; column += PANEL)
        multiply_tile<COUNT, 1>(matrix, column, in, in_stride, out, out_stride);
}

template <int COUNT>
void multiply_counted(int64_t count, const Packed& matrix, Columns own, const float* in, int64_t in_stride,
                      float* out, int64_t out_stride) {
    if (count == COUNT) return multiply_rows<COUNT>(matrix, own, in, in_stride, out, out_stride);
    if constexpr (COUNT > 1) multiply_counted<COUNT - 1>(count, matrix, own, in, in_stride, out, out_stride);
}

// out[row][own] = in[row] times the matrix; rows lie `in_stride` and `out_stride` floats apart.
inline void multiply(const Packed& matrix, Columns own, int64_t rows, const float* in, int64_t in_stride,
                     float* out, int64_t out_stride) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
        multiply_counted<ROWS>(count, matrix, own, in + row * in_stride, in_stride, out + row * out_stride,
                               out_stride);
    }
}

}  // namespace
}  // namespace newllm
