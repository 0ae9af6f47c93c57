// The sweeps on a CPU: float32 weights, any sizes, on at most so many threads.
#pragma once

#include <string>
#include <vector>

#include "context_sweep.h"

namespace newllm {

// The instruction sets of this machine that this was compiled for, the best first.
std::vector<std::string> cpu_instructions();

// By the given instruction set, or where that is empty by the best.
void context_forward_cpu(const ContextForward& sweep, int threads, const std::string& instructions);
void context_adjoint_cpu(const ContextAdjoint& sweep, int threads, const std::string& instructions);
void gated_forward_cpu(const GatedForward& sweep, int threads, const std::string& instructions);
void gated_adjoint_cpu(const GatedAdjoint& sweep, int threads, const std::string& instructions);

}  // namespace newllm
