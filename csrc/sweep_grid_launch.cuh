// Plans and launches of the sweeps that need no clusters; included by the file of each cell.
#pragma once

#include <algorithm>

#include "context_kernels_cuda.cuh"
#include "sweep_grid_cuda.cuh"

namespace newllm {
namespace {

constexpr int kLeastBlocks = 16;  // of a team
constexpr int kMostRows = 4;     // of a team at a time
constexpr int kGridColumns = 8;  // of a block, where there are blocks enough

// Of a vector that travels: the widest and the narrowest.
struct Widths {
    int64_t most, least;
};

int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

size_t packet_bytes(const CudaSweepPlan& plan, int64_t widest) {
    return size_t(2) * plan.clusters * plan.rows * even(widest) * sizeof(Packet);
}

int compiled_rows(const CudaSweepPlan& plan) { return plan.rows == 1 ? 1 : kMostRows; }

template <class Task>
CudaSweepPlan plan_task(const typename Task::Sweep& sweep, const Widths& widths) {
    if (!attribute(cudaDevAttrCooperativeLaunch)) return refused("the device has no cooperative launches");
    const size_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int processors = attribute(cudaDevAttrMultiProcessorCount);
    CudaSweepPlan plan{};
    plan.kernel = "grid";
    plan.threads = kGridThreads;
    for (plan.rows = static_cast<int>(std::min<int64_t>(kMostRows, sweep.span.rows())); plan.rows > 0; plan.rows /= 2) {
        const int64_t teams = (sweep.span.rows() + plan.rows - 1) / plan.rows;
        plan.clusters = static_cast<int>(std::min<int64_t>(teams, std::max(processors / kLeastBlocks, 1)));
        plan.groups = static_cast<int>((teams + plan.clusters - 1) / plan.clusters);
        const int64_t useful = std::min<int64_t>((widths.most + kGridColumns - 1) / kGridColumns, widths.least);
        plan.cluster = static_cast<int>(std::min<int64_t>(processors / plan.clusters, useful));
        const GridSizes sizes = Task::sizes(sweep, plan.cluster, true);
        if (grid_layout(sizes, plan.rows, compiled_rows(plan)).kept <= room) break;
    }
    if (plan.rows == 0) return refused("a row is wider than a block's shared memory holds");
    plan.at_once = plan.clusters;
    plan.shared = room;
    plan.workspace = packet_bytes(plan, widths.most);
    return plan;
}

template <class Task>
const char* launch_task(const typename Task::Sweep& sweep, int64_t widest, const CudaSweepPlan& plan,
                        const CudaCall& call) {
    const auto kernel = plan.rows == 1 ? sweep_grid_kernel<Task, 1> : sweep_grid_kernel<Task, kMostRows>;
    const auto stream = static_cast<cudaStream_t>(call.stream);
    const GridSizes sizes = Task::sizes(sweep, plan.cluster, call.half);
    const size_t wanted = grid_layout(sizes, plan.rows, compiled_rows(plan)).kept + aligned(sizes.kept);
    const size_t shared = std::min(plan.shared, wanted);
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status == cudaSuccess)
        status = cudaMemsetAsync(call.workspace, 0, packet_bytes(plan, widest), stream);
    if (status == cudaSuccess) {
        cudaLaunchAttribute together{};
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(plan.clusters * plan.cluster);
        config.blockDim = dim3(plan.threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        config.attrs = &together;
        config.numAttrs = 1;
        const GridTeams team{plan.rows, plan.clusters, plan.cluster, even(widest), static_cast<Packet*>(call.workspace),
                             shared,    call.timeout,  call.half};
        status = cudaLaunchKernelEx(&config, kernel, sweep, team);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

}  // namespace newllm
