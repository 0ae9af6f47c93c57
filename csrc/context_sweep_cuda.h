// The sweeps on a CUDA device. Addresses are the device's; the stream is a cudaStream_t.
#pragma once

#include <cstddef>

#include "context_sweep.h"

namespace newllm {

// How a sweep would run: on clusters of blocks, or for "grid" in teams of blocks, which are called clusters here too.
struct CudaSweepPlan {
    const char* kernel;  // "cluster", "tensor" or "grid"; null: none fits, and `reason` says why
    const char* reason;
    int cluster, threads;   // blocks of a cluster, threads of a block
    int rows, groups;       // rows that go together, and how many such groups a cluster takes
    int clusters, at_once;  // clusters in all, and how many of them the device runs at a time
    size_t shared;          // bytes of a block's shared memory
    size_t workspace;       // bytes of the device's memory that a call needs, without contents
};

struct CudaCall {
    int device;
    void* stream;
    bool half;     // matrices are bfloat16; otherwise float32
    int* timeout;  // on the device; set to 1 when a wait was given up. Null: the kernel then fails
    void* workspace;
};

enum class SweepDirection { kForward, kAdjoint };

// The fastest kernel. `half`: matrices are bfloat16; `exact`: even then contexts are not rounded on their way.
CudaSweepPlan plan_context_sweep(SweepDirection direction, int64_t layers, int64_t width, int64_t runs, bool half,
                                 int device, bool exact);
CudaSweepPlan plan_gated_sweep(SweepDirection direction, int64_t hidden, int64_t width, int64_t deeper, int64_t runs,
                               bool half, int device);

// Null, or what went wrong. Nothing waits for the device. A plan of the grid reads the matrices of an adjoint sweep
// transposed: [L, C, C], [C, H], [N, H, H] and [H, 3, C], input by output.
const char* context_forward_cuda(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* context_adjoint_cuda(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* gated_forward_cuda(const GatedForward& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* gated_adjoint_cuda(const GatedAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call);

}  // namespace newllm
