// The sweeps on a CPU: float32 weights, any sizes, on at most so many threads.
#pragma once

#include "context_sweep.h"

namespace newllm {

// The best instruction set of this machine among those that this was compiled for.
const char* cpu_instructions();

void context_forward_cpu(const ContextForward& sweep, int threads);
void context_adjoint_cpu(const ContextAdjoint& sweep, int threads);
void gated_forward_cpu(const GatedForward& sweep, int threads);
void gated_adjoint_cpu(const GatedAdjoint& sweep, int threads);

}  // namespace newllm
