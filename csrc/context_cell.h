// The context cells: one token's update, element by element, and the gradient of the layer norm that ends it.
//
// For a float on any device, and for whatever else has gelu, sigmoid and tanh declared before this file.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define NEWLLM_CELL __host__ __device__ inline
#else
#define NEWLLM_CELL inline
#endif

namespace newllm {

constexpr float kLayerNormEps = 1e-5f;
constexpr int kGates = 3;  // of the gated cell: forget, input, candidate

namespace {

NEWLLM_CELL float gelu(float x) { return x * 0.5f * (1.0f + erff(x * 0.70710678f)); }

NEWLLM_CELL float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

NEWLLM_CELL float tanh_of(float x) { return tanhf(x); }

// What the layer norm of a context layer reads, from the context before and the pre-activation.
template <class Value>
NEWLLM_CELL Value context_update(Value context, Value preactivation) {
    return context + gelu(preactivation);
}

// The same of the gated cell, from the pre-activations of its gates and of the candidate.
template <class Value>
NEWLLM_CELL Value gated_update(Value context, Value forget, Value write, Value candidate) {
    return sigmoid(forget) * context + sigmoid(write) * tanh_of(candidate);
}

// Gradient of what a layer norm reads. `weighted` is the gradient of its result times its weight; `mean` and
// `mean_normed` are the means of weighted and of weighted * normed over the width.
template <class Value, class Mean>
NEWLLM_CELL Value layer_norm_gradient(Value weighted, Value normed, Mean mean, Mean mean_normed, Mean rstd) {
    return (weighted - mean - normed * mean_normed) * rstd;
}

}  // namespace

}  // namespace newllm
