// Chooses among the kernels of the sweeps.
#include "context_sweep_cuda.h"

#include "context_kernels_cuda.cuh"
#include "cuda_launch.cuh"

namespace newllm {
namespace {

constexpr int kTensorRowsTogether = 8;
// Narrower vectors go to the grid. Clusters apply a layer norm's mean to the product with W, which rounding spoils
// where the deviation is next to nothing, and that of one or two columns often is.
constexpr int kLeastClusterWidth = 32;

// Whether every row has a cluster of its own, which tensor cores do not beat.
bool few(const CudaSweepPlan& plan) { return plan.clusters <= plan.at_once && plan.rows * plan.groups == 1; }

// The fastest on clusters for the width and number of runs.
template <class Arguments>
CudaSweepPlan choose(bool half, int64_t layers, int64_t width, int64_t runs, bool exact) {
    const CudaSweepPlan cluster = plan_cluster<Arguments>(half, layers, width, runs);
    if (!half || exact || layers > 1 || (cluster.kernel != nullptr && few(cluster))) return cluster;
    const CudaSweepPlan tensor = plan_tensor<Arguments>(width, runs);
    return tensor.kernel != nullptr ? tensor : cluster;
}

bool has_clusters(int device) {
    int major = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

bool on_grid(const CudaSweepPlan& plan) { return plan.workspace > 0; }

template <class Arguments, class Sweep>
const char* launch(const Sweep& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    if (guard.status() != cudaSuccess) return cudaGetErrorString(guard.status());
    if (on_grid(plan)) return launch_grid(sweep, plan, call);
    const Arguments args{sweep, call.half};
    return plan.rows == kTensorRowsTogether ? launch_tensor(args, plan, call) : launch_cluster(args, plan, call);
}

template <class Sweep>
const char* launch_gated(const Sweep& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    if (guard.status() != cudaSuccess) return cudaGetErrorString(guard.status());
    return on_grid(plan) ? launch_grid(sweep, plan, call) : launch_gated_cluster(sweep, plan, call);
}

template <class Arguments, class Sweep>
CudaSweepPlan plan_context(int64_t layers, int64_t width, int64_t runs, bool half, int device, bool exact) {
    if (width >= kLeastClusterWidth && has_clusters(device)) {
        const CudaSweepPlan plan = choose<Arguments>(half, layers, width, runs, exact);
        if (plan.kernel != nullptr) return plan;
    }
    Sweep sweep{};
    sweep.span = {runs, 1, 0, 0, 0};
    sweep.layers = layers;
    sweep.width = width;
    return plan_grid(sweep);
}

template <class Sweep>
CudaSweepPlan plan_gated(int64_t hidden, int64_t width, int64_t deeper, int64_t runs, bool half, int device) {
    Sweep sweep{};
    sweep.span = {runs, 1, 0, 0, 0};
    sweep.hidden = hidden;
    sweep.width = width;
    sweep.deeper = deeper;
    if (half && width >= kLeastClusterWidth && has_clusters(device)) {
        const CudaSweepPlan plan = plan_gated_cluster(sweep);
        if (plan.kernel != nullptr) return plan;
    }
    return plan_grid(sweep);
}

}  // namespace

CudaSweepPlan plan_context_sweep(SweepDirection direction, int64_t layers, int64_t width, int64_t runs, bool half,
                                 int device, bool exact) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return refused(cudaGetErrorString(guard.status()));
    const auto plan = direction == SweepDirection::kForward ? plan_context<ContextForwardArguments, ContextForward>
                                                            : plan_context<ContextAdjointArguments, ContextAdjoint>;
    return plan(layers, width, runs, half, device, exact);
}

CudaSweepPlan plan_gated_sweep(SweepDirection direction, int64_t hidden, int64_t width, int64_t deeper, int64_t runs,
                               bool half, int device) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return refused(cudaGetErrorString(guard.status()));
    const auto plan = direction == SweepDirection::kForward ? plan_gated<GatedForward> : plan_gated<GatedAdjoint>;
    return plan(hidden, width, deeper, runs, half, device);
}

const char* context_forward_cuda(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch<ContextForwardArguments>(sweep, plan, call);
}

const char* context_adjoint_cuda(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch<ContextAdjointArguments>(sweep, plan, call);
}

const char* gated_forward_cuda(const GatedForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_gated(sweep, plan, call);
}

const char* gated_adjoint_cuda(const GatedAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_gated(sweep, plan, call);
}

}  // namespace newllm
