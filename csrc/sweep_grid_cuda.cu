// Plans and launches of the sweeps that need no clusters.
#include <algorithm>

#include "context_grid_cuda.cuh"
#include "context_kernels_cuda.cuh"
#include "gated_grid_cuda.cuh"

namespace newllm {
namespace {

constexpr int kLeastBlocks = 8;  // of a team
constexpr size_t kAlignment = 256;

size_t counter_bytes(int teams) { return (teams * sizeof(unsigned) + kAlignment - 1) / kAlignment * kAlignment; }

int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

template <class Task>
CudaSweepPlan plan_task(const typename Task::Sweep& sweep, int64_t widest) {
    if (!attribute(cudaDevAttrCooperativeLaunch)) return refused("the device has no cooperative launches");
    const size_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), row = Task::shared(sweep) * sizeof(float);
    const int processors = attribute(cudaDevAttrMultiProcessorCount);
    if (row > room) return refused("a row is wider than a block's shared memory holds");
    CudaSweepPlan plan{};
    plan.kernel = "grid";
    plan.threads = kGridThreads;
    plan.rows = static_cast<int>(std::min<int64_t>(kGridRows, sweep.span.rows()));
    while (plan.rows * row > room) plan.rows = (plan.rows + 1) / 2;
    const int64_t teams = (sweep.span.rows() + plan.rows - 1) / plan.rows;
    plan.clusters = static_cast<int>(std::min<int64_t>(teams, std::max(processors / kLeastBlocks, 1)));
    plan.groups = static_cast<int>((teams + plan.clusters - 1) / plan.clusters);
    plan.at_once = plan.clusters;
    const int64_t useful = (widest + kGridWarps - 1) / kGridWarps;
    plan.cluster = static_cast<int>(std::min<int64_t>(processors / plan.clusters, useful));
    plan.shared = plan.rows * row;
    plan.workspace = counter_bytes(plan.clusters) + 2 * sweep.span.rows() * widest * sizeof(float);
    return plan;
}

template <class Task>
const char* launch_task(const typename Task::Sweep& sweep, int64_t widest, const CudaSweepPlan& plan,
                        const CudaCall& call) {
    const auto kernel = sweep_grid_kernel<Task>;
    const auto stream = static_cast<cudaStream_t>(call.stream);
    const size_t counters = counter_bytes(plan.clusters);
    char* const workspace = static_cast<char*>(call.workspace);
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(plan.shared));
    if (status == cudaSuccess) status = cudaMemsetAsync(workspace, 0, counters, stream);
    if (status == cudaSuccess) {
        cudaLaunchAttribute together{};
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(plan.clusters * plan.cluster);
        config.blockDim = dim3(plan.threads);
        config.dynamicSmemBytes = plan.shared;
        config.stream = stream;
        config.attrs = &together;
        config.numAttrs = 1;
        const GridTeams team{plan.rows,    plan.clusters, plan.cluster, reinterpret_cast<unsigned*>(workspace),
                             reinterpret_cast<float*>(workspace + counters), widest, call.timeout, call.half};
        status = cudaLaunchKernelEx(&config, kernel, sweep, team);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class Sweep>
int64_t widest(const Sweep& sweep) {
    return std::max(sweep.width, sweep.hidden);
}

}  // namespace

CudaSweepPlan plan_grid(const ContextForward& sweep) { return plan_task<ContextForwardGrid>(sweep, sweep.width); }
CudaSweepPlan plan_grid(const ContextAdjoint& sweep) { return plan_task<ContextAdjointGrid>(sweep, sweep.width); }
CudaSweepPlan plan_grid(const GatedForward& sweep) { return plan_task<GatedForwardGrid>(sweep, widest(sweep)); }
CudaSweepPlan plan_grid(const GatedAdjoint& sweep) { return plan_task<GatedAdjointGrid>(sweep, widest(sweep)); }

const char* launch_grid(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<ContextForwardGrid>(sweep, sweep.width, plan, call);
}
const char* launch_grid(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<ContextAdjointGrid>(sweep, sweep.width, plan, call);
}
const char* launch_grid(const GatedForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<GatedForwardGrid>(sweep, widest(sweep), plan, call);
}
const char* launch_grid(const GatedAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<GatedAdjointGrid>(sweep, widest(sweep), plan, call);
}

}  // namespace newllm
