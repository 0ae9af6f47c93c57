// What the kernels of the context cell are given, and which tokens their rows are.
#pragma once

#include "context_sweep.h"

namespace newllm {

struct ContextForwardArguments {
    ContextForward sweep;
    bool half;  // the matrix is bfloat16
};

struct ContextAdjointArguments {
    ContextAdjoint sweep;
    bool half;
};

__device__ __forceinline__ int64_t runs(const Span& span) { return span.batch * span.parts; }

// The token, counted over the arrays that have one entry a token, at which a run begins.
__device__ __forceinline__ int64_t first_token(const Span& span, int64_t row) {
    const int parts = static_cast<int>(span.parts), run = static_cast<int>(row);
    return int64_t(run / parts) * span.batch_stride + int64_t(run % parts) * span.part_stride;
}

}  // namespace newllm
