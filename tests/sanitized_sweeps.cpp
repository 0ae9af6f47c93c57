// The sweeps on a CPU over odd sizes, in arrays that end where their last number does, for the sanitizers.
//
// Every combination of cell, sizes, threads and instruction set, forwards and backwards. A result that is not
// finite, as where nothing was written, is an error too. Prints how many sweeps it ran.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "context_sweep_cpu.h"

namespace {

using namespace newllm;

struct Sizes {
    int64_t batch, tokens, width, hidden, layers, parts;
};

// Around vectors of 4, 8 and 16 floats, panels, tiles and pages; parts split the tokens evenly.
const Sizes kSizes[] = {
    {1, 1, 1, 1, 1, 1},    {1, 2, 3, 5, 2, 1},    {2, 3, 7, 9, 1, 1},     {3, 5, 8, 15, 3, 1},
    {1, 4, 15, 16, 1, 2},  {5, 2, 16, 17, 2, 1},  {2, 6, 17, 31, 1, 3},   {9, 3, 31, 33, 1, 1},
    {17, 2, 33, 70, 2, 1}, {2, 4, 64, 65, 1, 2},  {70, 1, 37, 41, 1, 1},  {1, 3, 129, 130, 1, 1},
    {6, 2, 260, 95, 1, 1}, {1, 2, 300, 270, 1, 1},
};

std::mt19937 generator(0);

// `count` floats on the heap, so that what is read or written beyond them is noticed.
class Array {
public:
    Array(int64_t count, float scale) : data_(new float[static_cast<size_t>(count)]), count_(count) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) data_[static_cast<size_t>(i)] = scale * normal(generator);
    }

    // To be written: NaN until then.
    explicit Array(int64_t count) : Array(count, 0.0f) {
        for (int64_t i = 0; i < count; ++i) data_[static_cast<size_t>(i)] = std::numeric_limits<float>::quiet_NaN();
    }

    operator float*() const { return data_.get(); }

    void check(const char* name) const {
        for (int64_t i = 0; i < count_; ++i)
            if (!std::isfinite(data_[static_cast<size_t>(i)])) {
                std::fprintf(stderr, "%s[%lld] is not finite\n", name, static_cast<long long>(i));
                std::exit(1);
            }
    }

private:
    std::unique_ptr<float[]> data_;
    int64_t count_;
};

Span span_of(const Sizes& s) {
    const int64_t tokens = s.tokens / s.parts;
    return {s.batch, s.parts, tokens, s.tokens, tokens};
}

void context(const Sizes& s, int threads, const std::string& instructions) {
    const int64_t all = s.batch * s.tokens * s.layers, rows = s.batch * s.parts, width = s.width;
    const float scale = 0.5f / std::sqrt(static_cast<float>(width));
    const Array drive(all * width, 1), weight(s.layers * width * width, scale), gain(s.layers * width, 1),
        shift(s.layers * width, 1), start(rows * width, 1), outputs(all * width), last(rows * width);
    context_forward_cpu({span_of(s), s.layers, width, drive, weight, gain, shift, start, outputs, last}, threads,
                        instructions);
    outputs.check("outputs");
    last.check("last");
    const Array outer(all * width, 1), slope(all * width, 1), normed(all * width, 1), rstd(all, 1),
        later(rows * width, 1), total(all * width), change(all * width), earlier(rows * width);
    context_adjoint_cpu({span_of(s), s.layers, width, outer, slope, normed, rstd, weight, gain, later, total, change,
                         earlier, nullptr, nullptr},
                        threads, instructions);
    total.check("total");
    change.check("change");
    earlier.check("start");
}

void gated(const Sizes& s, int threads, const std::string& instructions) {
    const int64_t all = s.batch * s.tokens, rows = s.batch * s.parts, width = s.width, hidden = s.hidden;
    const int64_t deeper = s.layers - 1;
    const float scale = 0.5f / std::sqrt(static_cast<float>(width + hidden));
    const Array drive(all * hidden, 1), weight_c(hidden * width, scale), weight_h(deeper * hidden * hidden, scale),
        bias_h(deeper * hidden, 1), gates(3 * width * hidden, scale), biases(3 * width, 1), gain(width, 1),
        shift(width, 1), start(rows * width, 1), outputs(all * width), last(rows * width);
    gated_forward_cpu({span_of(s), hidden, width, deeper, 0.75f, drive, weight_c, weight_h, bias_h, gates, biases, gain,
                       shift, start, outputs, last},
                      threads, instructions);
    outputs.check("outputs");
    last.check("last");
    const Array outer(all * width, 1), inside(all * width, 1), gate_slope(3 * all * width, 1), forget(all * width, 1),
        hidden_output(all * s.layers * hidden, 1), normed(all * width, 1), rstd(all, 1), later(rows * width, 1),
        total(all * width), gate_change(3 * all * width), hidden_change(all * s.layers * hidden),
        earlier(rows * width);
    gated_adjoint_cpu({span_of(s), hidden, width, deeper, outer, inside, gate_slope, forget, hidden_output, normed, rstd,
                       weight_c, weight_h, gates, gain, later, total, gate_change, hidden_change, earlier},
                      threads, instructions);
    total.check("total");
    gate_change.check("gate_change");
    hidden_change.check("hidden_change");
    earlier.check("start");
}

}  // namespace

int main() {
    int ran = 0;
    for (const std::string& instructions : newllm::cpu_instructions())
        for (const Sizes& sizes : kSizes)
            for (const int threads : {1, 3}) {
                context(sizes, threads, instructions);
                gated(sizes, threads, instructions);
                ran += 4;
            }
    std::printf("%d sweeps, %zu instruction sets\n", ran, newllm::cpu_instructions().size());
}
