// Chooses among the kernels of the context sweeps.
#include "context_sweep_cuda.h"

#include "context_kernels_cuda.cuh"
#include "cuda_launch.cuh"

namespace newllm {
namespace {

constexpr int kTensorRowsTogether = 8;

// Whether every row has a cluster of its own, which tensor cores do not beat.
bool few(const CudaSweepPlan& plan) { return plan.clusters <= plan.at_once && plan.rows * plan.groups == 1; }

template <class Arguments>
CudaSweepPlan choose(bool half, int64_t width, int64_t runs, int rows, int groups) {
    if (rows == kTensorRowsTogether)
        return half ? plan_tensor<Arguments>(width, runs) : refused("tensor cores take bfloat16 matrices only");
    const CudaSweepPlan cluster = plan_cluster<Arguments>(width, runs, rows, groups);
    if (rows || groups || !half || (cluster.kernel != nullptr && few(cluster))) return cluster;
    const CudaSweepPlan tensor = plan_tensor<Arguments>(width, runs);
    return tensor.kernel != nullptr ? tensor : cluster;
}

template <class Arguments>
const char* launch(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    if (guard.status() != cudaSuccess) return cudaGetErrorString(guard.status());
    return plan.rows == kTensorRowsTogether ? launch_tensor(args, plan, call) : launch_cluster(args, plan, call);
}

}  // namespace

CudaSweepPlan plan_context_sweep(SweepDirection direction, int64_t layers, int64_t width, int64_t runs, bool half,
                                 int device, int rows, int groups) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return refused(cudaGetErrorString(guard.status()));
    int major = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status != cudaSuccess) return refused(cudaGetErrorString(status));
    if (major < 9) return refused("the device has no thread-block clusters");
    if (layers > 1) return refused("more than one layer");
    const auto chosen = direction == SweepDirection::kForward ? choose<ContextForwardArguments>
                                                              : choose<ContextAdjointArguments>;
    return chosen(half, width, runs, rows, groups);
}

const char* context_forward_cuda(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch(ContextForwardArguments{sweep, call.half}, plan, call);
}

const char* context_adjoint_cuda(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch(ContextAdjointArguments{sweep, call.half}, plan, call);
}

}  // namespace newllm
