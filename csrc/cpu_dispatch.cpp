// Picks the sweeps that were compiled for this machine's instruction set.
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

Sweeps choose() {
#ifdef __x86_64__
    const bool fma = __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) return NEWLLM_TABLE(avx512);
    if (fma && __builtin_cpu_supports("avx2")) return NEWLLM_TABLE(avx2);
#endif
    return NEWLLM_TABLE(plain);
}

const Sweeps& sweeps() {
    static const Sweeps chosen = choose();
    return chosen;
}

}  // namespace

const char* cpu_instructions() { return sweeps().instructions; }

void context_forward_cpu(const ContextForward& sweep, int threads) { sweeps().context_forward(sweep, threads); }

void context_adjoint_cpu(const ContextAdjoint& sweep, int threads) { sweeps().context_adjoint(sweep, threads); }

void gated_forward_cpu(const GatedForward& sweep, int threads) { sweeps().gated_forward(sweep, threads); }

void gated_adjoint_cpu(const GatedAdjoint& sweep, int threads) { sweeps().gated_adjoint(sweep, threads); }

}  // namespace newllm
