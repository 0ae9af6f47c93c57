// What the sweeps of all cells share on a CPU: where rows lie, and layer norms whose columns several threads own.
#pragma once

#include "context_sweep.h"
#include "cpu_product.h"
// Its templates find the functions of vectors, declared above.
#include "context_cell.h"

namespace newllm {
namespace {

// With so few rows every member computes all columns of a layer norm for itself. With more, its own only, and
// waits at a second barrier for the others'.
constexpr int64_t FEW_ROWS = 4;

// A step has to have so many multiplications for each thread: with fewer, barriers cost more than they save.
constexpr int64_t LEAST_WORK = 16384;

inline int useful_threads(int threads, int64_t multiplications) {
    const int64_t useful = multiplications / LEAST_WORK;
    return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

// The tokens at which rows are at a step, in arrays that have one entry a token.
struct Tokens {
    int64_t* first;

    Tokens(Workspace& workspace, const Span& span)
        : first(reinterpret_cast<int64_t*>(workspace.floats(2 * span.rows()))) {
        for (int64_t row = 0; row < span.rows(); ++row)
            first[row] = row / span.parts * span.batch_stride + row % span.parts * span.part_stride;
    }

    int64_t operator()(int64_t row, int64_t step) const { return first[row] + step; }
};

// Rows made up to whole panels with zeros.
struct Rows {
    float* data;
    int64_t stride;

    Rows(Workspace& workspace, int64_t rows, int64_t width)
        : data(workspace.zeros(rows * padded(width))), stride(padded(width)) {}

    float* operator[](int64_t row) const { return data + row * stride; }

    void read(Columns columns, int64_t rows, const float* from, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = columns.begin; column < columns.end; column += LANES)
                store((*this)[row] + column, load(from + row * width + column, width - column));
    }

    void write(Columns columns, int64_t rows, float* to, int64_t width) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = columns.begin; column < columns.end; column += LANES)
                store(to + row * width + column, load((*this)[row] + column), width - column);
    }
};

// A buffer that every member reads as a whole: one for all, or with few rows one for each.
struct Common {
    int64_t rows;
    bool each;
    Rows data;

    Common(Workspace& workspace, int64_t rows, int64_t width, int members)
        : rows(rows), each(rows <= FEW_ROWS), data(workspace, rows * (each ? members : 1), width) {}

    Rows of(const Member& member) const {
        Rows mine = data;
        mine.data = data[each ? rows * member.index : 0];
        return mine;
    }

    // The columns that a member computes of it.
    Columns columns(Columns own, int64_t width) const { return each ? Columns{0, padded(width)} : own; }

    void wait(const Member& member) const {
        if (!each) member.wait();
    }
};

// What a member found in its columns of a row.
struct Sum {
    float first, second, count;
};

// Those of all members and rows. Two sets take turns, so that one barrier parts writing from reading.
struct Sums {
    Sum* data;
    int64_t spacing;
    int members;

    // A member's sums begin on a cache line of their own.
    Sums(Workspace& workspace, int64_t rows, int members) : spacing((rows + 15) / 16 * 16), members(members) {
        data = reinterpret_cast<Sum*>(workspace.zeros(2 * members * spacing * 3));
    }

    Sum& at(int turn, int64_t row, int member) const { return data[(turn * members + member) * spacing + row]; }
};

// Mean of the own columns of u, and the squares of what it leaves.
inline Sum own_moments(const float* u, Columns own, int64_t width) {
    const float count = static_cast<float>(least(own.end, width) - least(own.begin, width));
    Vector total = {};
    for (int64_t column = own.begin; column < own.end; column += LANES) total += load(u + column);
    const float mean = count > 0 ? sum(total) / count : 0.0f;
    Vector squares = {};
    for (int64_t column = own.begin; column < own.end; column += LANES) {
        const Vector rest = first(load(u + column) - mean, width - column);
        squares += rest * rest;
    }
    return {mean, sum(squares), count};
}

struct Moments {
    float mean, rstd;
};

// Mean and 1 / standard deviation of a row from all members' columns (Chan, Golub, LeVeque 1983).
inline Moments all_moments(const Sums& sums, int turn, int64_t row, int64_t width, int members) {
    float mean = 0, squares = 0;
    for (int i = 0; i < members; ++i) {
        const Sum& own = sums.at(turn, row, i);
        mean += own.first * (own.count / static_cast<float>(width));
    }
    for (int i = 0; i < members; ++i) {
        const Sum& own = sums.at(turn, row, i);
        squares += own.second + own.count * (own.first - mean) * (own.first - mean);
    }
    return {mean, 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + kLayerNormEps)};
}

// use(row, column, normed) for the columns of u's layer norm, weight and bias apart.
template <class Use>
void each_normed(const Rows& u, const Sums& sums, int turn, int64_t rows, Columns columns, int64_t width,
                 int members, Use use) {
    for (int64_t row = 0; row < rows; ++row) {
        const Moments moments = all_moments(sums, turn, row, width, members);
        for (int64_t column = columns.begin; column < columns.end; column += LANES)
            use(row, column, (load(u[row] + column) - moments.mean) * moments.rstd);
    }
}

// Sums over own columns of the weighted gradient of a layer norm's result, and of it times normed.
inline Sum own_slopes(const float* weighted, const float* normed, Columns own, int64_t width) {
    Vector plain = {}, product = {};
    for (int64_t column = own.begin; column < own.end; column += LANES) {
        const Vector x = load(weighted + column);
        plain += x;
        product += x * load(normed + column, width - column);
    }
    return {sum(plain), sum(product), 0};
}

// use(row, column, gradient) for the columns of what a layer norm read; `normed` and `rstd` are those of all
// tokens, `index` counts a row's layer norms in them.
template <class Index, class Use>
void each_gradient(const Rows& weighted, const Sums& sums, int turn, int64_t rows, Columns columns,
                   int64_t width, int members, const float* normed, const float* rstd, Index index, Use use) {
    for (int64_t row = 0; row < rows; ++row) {
        float plain = 0, product = 0;
        for (int i = 0; i < members; ++i) {
            plain += sums.at(turn, row, i).first;
            product += sums.at(turn, row, i).second;
        }
        plain /= static_cast<float>(width);
        product /= static_cast<float>(width);
        const float* own = normed + index(row) * width;
        const float scale = rstd[index(row)];
        for (int64_t column = columns.begin; column < columns.end; column += LANES) {
            const Vector n = load(own + column, width - column);
            use(row, column, layer_norm_gradient(load(weighted[row] + column), n, plain, product, scale));
        }
    }
}

// Run a sweep's task on the threads that pay, for so many multiplications a step.
template <class Task, class Sweep>
void run_sweep(const Sweep& sweep, int threads, int64_t multiplications) {
    threads = useful_threads(threads, multiplications);
    const Task task(sweep, threads);
    const Body body = [](const void* shared, const Member& member) {
        static_cast<const Task*>(shared)->run(member);
    };
    run_team(threads, body, &task);
}

}  // namespace
}  // namespace newllm
