// Chooses and launches the kernels of the context sweeps.
#include "context_sweep_cuda.h"

#include <algorithm>

#include "context_step_cuda.cuh"

namespace newllm {
namespace {

constexpr int kMostGroups = 4;

// Makes a device current, and the earlier one again.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status_ == cudaSuccess) cudaSetDevice(before_);
    }
    cudaError_t status() const { return status_; }

  private:
    int before_ = 0;
    cudaError_t status_;
};

template <class Step>
using Kernel = void (*)(typename Step::Arguments, int, int*);

// One compiled kernel: up to which width it goes, and what it needs.
template <class Step>
struct Variant {
    int width, columns, rows;
    Kernel<Step> kernel;
    SweepLayout (*layout)(int groups);
};

template <class Step, int Columns, int Senders, int Resident, int Rows>
constexpr Variant<Step> variant() {
    using Tile = SweepTile<Columns, Senders, Resident, Rows>;
    return {32 * Senders * Columns, Columns, Rows, sweep_cluster_kernel<Tile, Step>, sweep_layout<Tile, Step>};
}

// Narrow ones first: the first that is wide enough is taken.
template <class Step>
const Variant<Step>* find_variant(int64_t width, int rows) {
    static const Variant<Step> variants[] = {
        variant<Step, 8, 1, 1, 1>(), variant<Step, 8, 1, 1, 4>(), variant<Step, 8, 2, 2, 1>(),
        variant<Step, 8, 2, 2, 4>(), variant<Step, 6, 4, 4, 1>(), variant<Step, 6, 4, 4, 4>(),
        variant<Step, 8, 4, 2, 1>(), variant<Step, 8, 4, 2, 4>(),
    };
    for (const Variant<Step>& candidate : variants)
        if (candidate.width >= width && candidate.rows == rows) return &candidate;
    return nullptr;
}

struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};

    Launch(int blocks, int cluster_blocks, size_t shared, void* stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = cluster_blocks;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(kSweepThreads);
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
};

template <class Step>
cudaError_t allow(Kernel<Step> kernel, size_t shared) {
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

CudaSweepPlan refused(const char* reason) {
    CudaSweepPlan plan{};
    plan.reason = reason;
    return plan;
}

template <class Step>
CudaSweepPlan plan_variant(const Variant<Step>& variant, int64_t width, int64_t runs, int groups) {
    CudaSweepPlan plan{};
    plan.kernel = "cluster";
    plan.threads = kSweepThreads;
    plan.rows = variant.rows;
    plan.groups = groups;
    plan.cluster = 1;
    while (int64_t(plan.cluster) * kSweepWarps * variant.columns < width) plan.cluster *= 2;
    plan.shared = variant.layout(groups).total;
    const int64_t together = int64_t(plan.rows) * groups;
    plan.clusters = static_cast<int>((runs + together - 1) / together);
    cudaError_t status = allow<Step>(variant.kernel, plan.shared);
    if (status == cudaSuccess) {
        Launch launch(plan.clusters * plan.cluster, plan.cluster, plan.shared, nullptr);
        status = cudaOccupancyMaxActiveClusters(&plan.at_once, variant.kernel, &launch.config);
    }
    if (status != cudaSuccess || plan.at_once < 1) {
        cudaGetLastError();
        return refused(status != cudaSuccess ? cudaGetErrorString(status) : "no cluster of this size fits the device");
    }
    return plan;
}

template <class Step>
CudaSweepPlan plan_step(int64_t width, int64_t runs, int rows, int groups) {
    const Variant<Step>* variant = find_variant<Step>(width, rows ? rows : 1);
    if (variant == nullptr) return refused("the width is above what a cluster holds");
    CudaSweepPlan plan = plan_variant(*variant, width, runs, std::max(groups, 1));
    if (plan.kernel == nullptr || groups) return plan;
    const int64_t share = (runs + plan.at_once - 1) / plan.at_once;
    if (share == 1) return plan;
    const int together = rows ? rows : share <= 3 ? 1 : 4;
    const int chosen = static_cast<int>(std::min<int64_t>((share + together - 1) / together, kMostGroups));
    return plan_variant(*find_variant<Step>(width, together), width, runs, chosen);
}

template <class Step>
const char* launch(const typename Step::Arguments& args, const CudaSweepPlan& plan, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    if (guard.status() != cudaSuccess) return cudaGetErrorString(guard.status());
    const Variant<Step>* variant = find_variant<Step>(args.sweep.width, plan.rows);
    cudaError_t status = allow<Step>(variant->kernel, plan.shared);
    if (status == cudaSuccess) {
        Launch launch(plan.clusters * plan.cluster, plan.cluster, plan.shared, call.stream);
        status = cudaLaunchKernelEx(&launch.config, variant->kernel, args, plan.groups, call.timeout);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

CudaSweepPlan plan_context_sweep(SweepDirection direction, int64_t layers, int64_t width, int64_t runs, int device,
                                 int rows, int groups) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return refused(cudaGetErrorString(guard.status()));
    int major = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status != cudaSuccess) return refused(cudaGetErrorString(status));
    if (major < 9) return refused("the device has no thread-block clusters");
    if (layers > 1) return refused("more than one layer");
    return direction == SweepDirection::kForward ? plan_step<ContextForwardStep>(width, runs, rows, groups)
                                                 : plan_step<ContextAdjointStep>(width, runs, rows, groups);
}

const char* context_forward_cuda(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch<ContextForwardStep>({sweep, call.half}, plan, call);
}

const char* context_adjoint_cuda(const ContextAdjoint& sweep, const float* slope_product, const float* normed_product,
                                 const CudaSweepPlan& plan, const CudaCall& call) {
    return launch<ContextAdjointStep>({sweep, slope_product, normed_product, call.half}, plan, call);
}

}  // namespace newllm
