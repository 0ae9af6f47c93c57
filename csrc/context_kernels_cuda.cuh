// The families of kernels. Plans and launches are for the current device.
#pragma once

#include "context_arguments_cuda.cuh"
#include "context_sweep_cuda.h"

namespace newllm {

inline CudaSweepPlan refused(const char* reason) {
    CudaSweepPlan plan{};
    plan.reason = reason;
    return plan;
}

// Few rows (context_sweep_cluster.cuh). Arguments: forward or adjoint.
template <class Arguments>
CudaSweepPlan plan_cluster(bool half, int64_t layers, int64_t width, int64_t runs);
template <class Arguments>
const char* launch_cluster(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call);

// Many rows, bfloat16 matrices (context_sweep_tensor.cuh).
template <class Arguments>
CudaSweepPlan plan_tensor(int64_t width, int64_t runs);
template <class Arguments>
const char* launch_tensor(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call);

// The gated cell with few rows, one hidden layer and bfloat16 matrices (gated_cluster_cuda.cuh). Sweep: forward or
// adjoint.
template <class Sweep>
CudaSweepPlan plan_gated_cluster(const Sweep& sweep);
template <class Sweep>
const char* launch_gated_cluster(const Sweep& sweep, const CudaSweepPlan& plan, const CudaCall& call);

// Any device, any sizes (sweep_grid_cuda.cuh). To be planned, a sweep needs its sizes and number of rows only.
CudaSweepPlan plan_grid(const ContextForward& sweep);
CudaSweepPlan plan_grid(const ContextAdjoint& sweep);
CudaSweepPlan plan_grid(const GatedForward& sweep);
CudaSweepPlan plan_grid(const GatedAdjoint& sweep);
const char* launch_grid(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* launch_grid(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* launch_grid(const GatedForward& sweep, const CudaSweepPlan& plan, const CudaCall& call);
const char* launch_grid(const GatedAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call);

}  // namespace newllm
