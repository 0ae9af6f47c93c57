// What a sweep is asked to do: sizes and addresses. The same for every device; nothing here depends on one.
//
// Arrays are contiguous; activations are float32. B batch, T tokens, L layers, C context width, H hidden width,
// N hidden layers after the first. A matrix is stored output by input, as torch.nn.Linear stores it.
#pragma once

#include <cstdint>

namespace newllm {

// Which tokens are swept: `parts` runs side by side in each of `batch` sequences, each of `tokens` tokens.
// Run p of sequence b begins at token b * batch_stride + p * part_stride of the arrays that have one entry a
// token, and is row b * parts + p of those that have one a run. One run of a whole sequence: parts = 1,
// batch_stride = T.
struct Span {
    int64_t batch, parts, tokens, batch_stride, part_stride;

    int64_t rows() const { return batch * parts; }
};

// c <- LN(c + GELU(W c + drive)), layer after layer. Layer 0 reads what the last layer left a token before.
struct ContextForward {
    Span span;
    int64_t layers, width;
    const float* drive;      // [B, T, L, C], W_x x + b
    const void* weight;      // [L, C, C]
    const float* ln_weight;  // [L, C]
    const float* ln_bias;    // [L, C]
    const float* start;      // [rows, C]
    float* outputs;          // [B, T, L, C], every layer's result
    float* last;             // [rows, C], the last layer's result after the last token of each run
};

// The same backwards in time. What does not depend on later tokens is given for all tokens.
//   total  = outer + carry;                      u = c + GELU(a) is what the layer norm reads
//   du     = gradient of u through the layer norm;  change = du * slope
//   carry  = du + W^T change                     for the layer before, or the last layer a token before
struct ContextAdjoint {
    Span span;
    int64_t layers, width;
    const float* outer;      // [B, T, L, C], gradient that reaches the outputs from outside
    const float* slope;      // [B, T, L, C], GELU'(a)
    const float* normed;     // [B, T, L, C], (u - mean) * rstd
    const float* rstd;       // [B, T, L]
    const void* weight;      // [L, C, C]
    const float* ln_weight;  // [L, C]
    const float* last;       // [rows, C], carry into the last token of each run
    float* total;            // [B, T, L, C], gradient of the outputs
    float* change;           // [B, T, L, C], gradient of a, and so of the drive
    float* start;            // [rows, C], gradient of the start
    // Only a GPU reads these, which do not depend on later tokens either:
    const float* slope_product;   // [B, T, L, C], W^T slope
    const float* normed_product;  // [B, T, L, C], W^T (slope normed)
};

// h = relu(W_c c + drive), then N more hidden layers; c <- LN(sigmoid(F h) c + sigmoid(I h) tanh(D h)), clamped.
struct GatedForward {
    Span span;
    int64_t hidden, width, deeper;
    float clamp;              // infinity: none
    const float* drive;       // [B, T, H]
    const void* weight_c;     // [H, C]
    const void* weight_h;     // [N, H, H]
    const float* bias_h;      // [N, H]
    const void* weight_gate;  // [3, C, H]: forget, input, candidate
    const float* bias_gate;   // [3, C]
    const float* ln_weight;   // [C]
    const float* ln_bias;     // [C]
    const float* start;       // [rows, C]
    float* outputs;           // [B, T, C]
    float* last;              // [rows, C]
};

struct GatedAdjoint {
    Span span;
    int64_t hidden, width, deeper;
    const float* outer;          // [B, T, C]
    const float* inside;         // [B, T, C], 1 where the clamp lets through and 0 elsewhere; null: no clamp
    const float* gate_slope;     // [B, T, 3, C], derivative of u by what the gates' functions read
    const float* forget;         // [B, T, C], sigmoid(F h)
    const float* hidden_output;  // [B, T, N + 1, H]; relu lets through where it is above 0
    const float* normed;         // [B, T, C]
    const float* rstd;           // [B, T]
    const void* weight_c;        // [H, C]
    const void* weight_h;        // [N, H, H]
    const void* weight_gate;     // [3, C, H]
    const float* ln_weight;      // [C]
    const float* last;           // [rows, C]
    float* total;                // [B, T, C], gradient of the layer norm's result
    float* gate_change;          // [B, T, 3, C], gradient of what the gates' functions read
    float* hidden_change;        // [B, T, N + 1, H], gradient of what each relu reads
    float* start;                // [rows, C]
};

}  // namespace newllm
