#include "context_grid_cuda.cuh"
#include "sweep_grid_launch.cuh"

namespace newllm {

CudaSweepPlan plan_grid(const ContextForward& sweep) {
    return plan_task<ContextForwardGrid>(sweep, {sweep.width, sweep.width});
}
CudaSweepPlan plan_grid(const ContextAdjoint& sweep) {
    return plan_task<ContextAdjointGrid>(sweep, {sweep.width, sweep.width});
}

const char* launch_grid(const ContextForward& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<ContextForwardGrid>(sweep, sweep.width, plan, call);
}
const char* launch_grid(const ContextAdjoint& sweep, const CudaSweepPlan& plan, const CudaCall& call) {
    return launch_task<ContextAdjointGrid>(sweep, sweep.width, plan, call);
}

}  // namespace newllm
