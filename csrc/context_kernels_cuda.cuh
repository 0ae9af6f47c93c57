// The families of kernels of the context cell. Plans and launches are for the current device.
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
CudaSweepPlan plan_cluster(int64_t width, int64_t runs, int rows, int groups);
template <class Arguments>
const char* launch_cluster(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call);

// Many rows, bfloat16 matrices (context_sweep_tensor.cuh).
template <class Arguments>
CudaSweepPlan plan_tensor(int64_t width, int64_t runs);
template <class Arguments>
const char* launch_tensor(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call);

}  // namespace newllm
