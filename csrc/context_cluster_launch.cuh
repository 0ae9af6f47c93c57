// The compiled kernels for few rows, by direction; included by the file of each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "context_kernels_cuda.cuh"
#include "context_step_cuda.cuh"
#include "cuda_launch.cuh"

namespace newllm {
namespace {

constexpr int kMostGroups = 4;

template <class Arguments, int Layers>
using Step = std::conditional_t<std::is_same_v<Arguments, ContextForwardArguments>, ContextForwardStep<Layers>,
                                ContextAdjointStep<Layers>>;

// One compiled kernel: up to which width it goes, and what it needs.
template <class Arguments>
struct Variant {
    int width, columns, rows, layers;
    bool half;  // for bfloat16 only
    void (*kernel)(Arguments, int, int*);
    SweepLayout (*layout)(int groups);
};

template <class Arguments, int Columns, int Senders, int Resident, int Rows, int Layers = 1, bool Half = false>
constexpr Variant<Arguments> variant() {
    using Tile = SweepTile<Columns, Senders, Resident, Rows, Layers, Half>;
    return {32 * Senders * Columns, Columns, Rows, Layers, Half, sweep_cluster_kernel<Tile, Step<Arguments, Layers>>,
            sweep_layout<Tile, Step<Arguments, Layers>>};
}

// Narrow ones first: the first that is wide enough is taken.
template <class Arguments>
const Variant<Arguments>* find_variant(bool half, int64_t layers, int64_t width, int rows) {
    static const Variant<Arguments> variants[] = {
        variant<Arguments, 8, 1, 1, 1>(), variant<Arguments, 8, 1, 1, 4>(), variant<Arguments, 8, 2, 2, 1>(),
        variant<Arguments, 8, 2, 2, 4>(), variant<Arguments, 6, 4, 4, 1>(), variant<Arguments, 6, 4, 4, 4>(),
        variant<Arguments, 8, 4, 2, 1>(), variant<Arguments, 8, 4, 2, 4>(), variant<Arguments, 6, 4, 2, 1, 2>(),
        variant<Arguments, 8, 4, 1, 1, 2, true>(), variant<Arguments, 6, 4, 1, 1, 3, true>(),
    };
    for (const Variant<Arguments>& candidate : variants)
        if (candidate.layers == layers && candidate.width >= width && candidate.rows == rows && candidate.half <= half)
            return &candidate;
    return nullptr;
}

template <class Arguments>
CudaSweepPlan plan_variant(const Variant<Arguments>& variant, int64_t width, int64_t runs, int groups) {
    CudaSweepPlan plan{};
    plan.threads = kSweepThreads;
    plan.rows = variant.rows;
    plan.groups = groups;
    plan.cluster = kFewestBlocks;
    while (int64_t(plan.cluster) * kSweepWarps * variant.columns < width) plan.cluster *= 2;
    plan.shared = variant.layout(groups).total;
    const int64_t together = int64_t(plan.rows) * groups;
    plan.clusters = static_cast<int>((runs + together - 1) / together);
    plan.reason = count_clusters(variant.kernel, plan.cluster, plan.threads, plan.shared, plan.at_once);
    plan.kernel = plan.reason == nullptr ? "cluster" : nullptr;
    return plan;
}

}  // namespace

template <class Arguments>
CudaSweepPlan plan_cluster(bool half, int64_t layers, int64_t width, int64_t runs) {
    const auto* const variant = find_variant<Arguments>(half, layers, width, 1);
    if (variant == nullptr) return refused("the matrices are larger than what a cluster holds");
    const CudaSweepPlan plan = plan_variant(*variant, width, runs, 1);
    if (plan.kernel == nullptr) return plan;
    const int64_t share = (runs + plan.at_once - 1) / plan.at_once;
    if (share == 1) return plan;
    const int together = share <= 2 || layers > 1 ? 1 : 4;
    const auto& several = *find_variant<Arguments>(half, layers, width, together);
    for (int64_t tried = std::min<int64_t>((share + together - 1) / together, kMostGroups); tried > 1; tried--) {
        const CudaSweepPlan fewer = plan_variant(several, width, runs, static_cast<int>(tried));
        if (fewer.kernel != nullptr) return fewer;
    }
    return plan_variant(several, width, runs, 1);
}

template <class Arguments>
const char* launch_cluster(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call) {
    const auto kernel = find_variant<Arguments>(args.half, args.sweep.layers, args.sweep.width, plan.rows)->kernel;
    cudaError_t status = allow(kernel, plan.shared);
    if (status == cudaSuccess) {
        const ClusterLaunch launch(plan.clusters, plan.cluster, plan.threads, plan.shared, call.stream);
        status = cudaLaunchKernelEx(&launch.config, kernel, args, plan.groups, call.timeout);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace newllm
