#include "context_cluster_launch.cuh"

namespace newllm {

template CudaSweepPlan plan_cluster<ContextAdjointArguments>(bool, int64_t, int64_t, int64_t);
template const char* launch_cluster(const ContextAdjointArguments&, const CudaSweepPlan&, const CudaCall&);

}  // namespace newllm
