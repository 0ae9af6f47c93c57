#include <algorithm>

#include "context_kernels_cuda.cuh"
#include "cuda_launch.cuh"
#include "gated_step_cuda.cuh"

namespace newllm {
namespace {

constexpr int kMostRows = 4;

// One compiled kernel, and what a block of it needs.
template <class Sweep>
struct GatedVariant {
    int rows;
    size_t shared;
    void (*kernel)(Sweep, int*);
};

template <class Step, int Rows, bool Adjoint, int Resident>
constexpr GatedVariant<typename Step::Sweep> gated_variant() {
    using Tile = GatedTile<Rows, Adjoint, Resident>;
    return {Rows, GatedLayout<Tile>::total, gated_cluster_kernel<Tile, Step>};
}

GatedVariant<GatedForward> find_variant(const GatedForward&, int rows) {
    return rows == 1 ? gated_variant<GatedForwardStep, 1, false, 42>()
                     : gated_variant<GatedForwardStep, kMostRows, false, 36>();
}
GatedVariant<GatedAdjoint> find_variant(const GatedAdjoint&, int rows) {
    return rows == 1 ? gated_variant<GatedAdjointStep, 1, true, 40>()
                     : gated_variant<GatedAdjointStep, kMostRows, true, 38>();
}

template <class Sweep>
CudaSweepPlan plan_rows(const Sweep& sweep, int rows) {
    const auto variant = find_variant(sweep, rows);
    CudaSweepPlan plan{};
    plan.threads = kGatedThreads;
    plan.rows = variant.rows;
    plan.groups = 1;
    plan.cluster = kFewestBlocks;
    while (plan.cluster * kGatedColumns < std::max(sweep.width, sweep.hidden)) plan.cluster *= 2;
    plan.shared = variant.shared;
    plan.clusters = static_cast<int>((sweep.span.rows() + plan.rows - 1) / plan.rows);
    plan.reason = count_clusters(variant.kernel, plan.cluster, plan.threads, plan.shared, plan.at_once);
    plan.kernel = plan.reason == nullptr ? "cluster" : nullptr;
    return plan;
}

}  // namespace

template <class Sweep>
CudaSweepPlan plan_gated_cluster(const Sweep& sweep) {
    if (std::max(sweep.width, sweep.hidden) > kMostGatedBlocks * kGatedColumns || sweep.deeper > 0)
        return refused("the matrices are larger than what a cluster holds");
    const CudaSweepPlan plan = plan_rows(sweep, 1);
    return plan.kernel == nullptr || plan.clusters <= plan.at_once ? plan : plan_rows(sweep, kMostRows);
}

template <class Sweep>
const char* launch_gated_cluster(const Sweep& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    const auto kernel = find_variant(sweep, plan.rows).kernel;
    cudaError_t status = allow(kernel, plan.shared);
    if (status == cudaSuccess) {
        const ClusterLaunch launch(plan.clusters, plan.cluster, plan.threads, plan.shared, call.stream);
        status = cudaLaunchKernelEx(&launch.config, kernel, sweep, call.timeout);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template CudaSweepPlan plan_gated_cluster(const GatedForward&);
template CudaSweepPlan plan_gated_cluster(const GatedAdjoint&);
template const char* launch_gated_cluster(const GatedForward&, const CudaSweepPlan&, const CudaCall&);
template const char* launch_gated_cluster(const GatedAdjoint&, const CudaSweepPlan&, const CudaCall&);

}  // namespace newllm
