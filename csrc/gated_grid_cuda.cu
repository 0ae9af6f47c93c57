#include "gated_grid_cuda.cuh"
#include "sweep_grid_launch.cuh"

namespace newllm {
namespace {

template <class Sweep>
Widths widths(const Sweep& sweep) {
    return {std::max(sweep.width, sweep.hidden), std::min(sweep.width, sweep.hidden)};
}

}  // namespace

CudaSweepPlan plan_grid(const GatedForward& sweep) { return plan_task<GatedForwardGrid>(sweep, widths(sweep)); }
CudaSweepPlan plan_grid(const GatedAdjoint& sweep) { return plan_task<GatedAdjointGrid>(sweep, widths(sweep)); }

const char* launch_grid(const GatedForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<GatedForwardGrid>(sweep, widths(sweep).most, plan, call);
}
const char* launch_grid(const GatedAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<GatedAdjointGrid>(sweep, widths(sweep).most, plan, call);
}

}  // namespace newllm
