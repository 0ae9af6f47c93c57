// Picks the sweeps that were compiled for this machine's instruction set.
#include <stdexcept>

#include "context_sweep_cpu.h"

namespace newllm {

#define NEWLLM_SWEEPS(isa)                                  \
    namespace isa {                                         \
    void context_forward(const ContextForward&, int);       \
    void context_adjoint(const ContextAdjoint&, int);       \
    void gated_forward(const GatedForward&, int);           \
    void gated_adjoint(const GatedAdjoint&, int);           \
    }

NEWLLM_SWEEPS(plain)
#ifdef __x86_64__
NEWLLM_SWEEPS(avx2)
NEWLLM_SWEEPS(avx512)
#endif

namespace {

struct Sweeps {
    const char* instructions;
    void (*context_forward)(const ContextForward&, int);
    void (*context_adjoint)(const ContextAdjoint&, int);
    void (*gated_forward)(const GatedForward&, int);
    void (*gated_adjoint)(const GatedAdjoint&, int);
};

#define NEWLLM_TABLE(isa) \
    Sweeps{#isa, isa::context_forward, isa::context_adjoint, isa::gated_forward, isa::gated_adjoint}

// All that this machine can run, the best first.
std::vector<Sweeps> available() {
    std::vector<Sweeps> found;
#ifdef __x86_64__
    const bool fma = __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) found.push_back(NEWLLM_TABLE(avx512));
    if (fma && __builtin_cpu_supports("avx2")) found.push_back(NEWLLM_TABLE(avx2));
#endif
    found.push_back(NEWLLM_TABLE(plain));
    return found;
}

const std::vector<Sweeps>& sweeps() {
    static const std::vector<Sweeps> found = available();
    return found;
}

const Sweeps& best(const std::string& instructions) {
    if (instructions.empty()) return sweeps().front();
    for (const Sweeps& each : sweeps())
        if (instructions == each.instructions) return each;
    throw std::invalid_argument("this machine has no instructions named " + instructions);
}

}  // namespace

std::vector<std::string> cpu_instructions() {
    std::vector<std::string> names;
    for (const Sweeps& each : sweeps()) names.emplace_back(each.instructions);
    return names;
}

void context_forward_cpu(const ContextForward& sweep, int threads, const std::string& instructions) {
    best(instructions).context_forward(sweep, threads);
}

void context_adjoint_cpu(const ContextAdjoint& sweep, int threads, const std::string& instructions) {
    best(instructions).context_adjoint(sweep, threads);
}

void gated_forward_cpu(const GatedForward& sweep, int threads, const std::string& instructions) {
    best(instructions).gated_forward(sweep, threads);
}

void gated_adjoint_cpu(const GatedAdjoint& sweep, int threads, const std::string& instructions) {
    best(instructions).gated_adjoint(sweep, threads);
}

}  // namespace newllm
