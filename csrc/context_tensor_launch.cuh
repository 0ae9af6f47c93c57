// The compiled kernels for many rows, by direction; included by the file of each.
#pragma once

#include <type_traits>

#include "context_kernels_cuda.cuh"
#include "context_rows_cuda.cuh"
#include "cuda_launch.cuh"

namespace newllm {
namespace {

template <class Arguments, int Strips>
using Rows = std::conditional_t<std::is_same_v<Arguments, ContextForwardArguments>, ContextForwardRows<Strips>,
                                ContextAdjointRows<Strips>>;

// One compiled kernel: up to which width it goes, and what it needs.
template <class Arguments>
struct TensorVariant {
    int width, cluster;
    size_t shared;
    void (*kernel)(Arguments, int*);
};

template <class Arguments, int Strips, int Blocks, int Resident>
constexpr TensorVariant<Arguments> tensor_variant() {
    using Tile = TensorTile<Strips, Blocks, Resident>;
    return {Blocks * Tile::kColumns, Blocks, TensorLayout<Tile>::total,
            sweep_tensor_kernel<Tile, Rows<Arguments, Strips>>};
}

// Narrow ones first: the first that is wide enough is taken.
template <class Arguments>
const TensorVariant<Arguments>* find_tensor_variant(int64_t width) {
    static const TensorVariant<Arguments> variants[] = {
        tensor_variant<Arguments, 4, 4, 32>(),
        tensor_variant<Arguments, 3, 8, 36>(),
        tensor_variant<Arguments, 4, 8, 32>(),
    };
    for (const TensorVariant<Arguments>& candidate : variants)
        if (candidate.width >= width) return &candidate;
    return nullptr;
}

}  // namespace

template <class Arguments>
CudaSweepPlan plan_tensor(int64_t width, int64_t runs) {
    const auto* const variant = find_tensor_variant<Arguments>(width);
    if (variant == nullptr) return refused("the width is above what a cluster's tensor cores are fed with");
    CudaSweepPlan plan{};
    plan.cluster = variant->cluster;
    plan.threads = kTensorThreads;
    plan.rows = kTensorRows;
    plan.groups = 1;
    plan.shared = variant->shared;
    plan.clusters = static_cast<int>((runs + kTensorRows - 1) / kTensorRows);
    plan.reason = count_clusters(variant->kernel, plan.cluster, plan.threads, plan.shared, plan.at_once);
    plan.kernel = plan.reason == nullptr ? "tensor" : nullptr;
    return plan;
}

template <class Arguments>
const char* launch_tensor(const Arguments& args, const CudaSweepPlan& plan, const CudaCall& call) {
    const auto kernel = find_tensor_variant<Arguments>(args.sweep.width)->kernel;
    cudaError_t status = allow(kernel, plan.shared);
    if (status == cudaSuccess) {
        const ClusterLaunch launch(plan.clusters, plan.cluster, plan.threads, plan.shared, call.stream);
        status = cudaLaunchKernelEx(&launch.config, kernel, args, call.timeout);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace newllm
