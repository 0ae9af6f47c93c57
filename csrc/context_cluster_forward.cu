#include "context_cluster_launch.cuh"

namespace newllm {

template CudaSweepPlan plan_cluster<ContextForwardArguments>(bool, int64_t, int64_t, int64_t);
template const char* launch_cluster(const ContextForwardArguments&, const CudaSweepPlan&, const CudaCall&);

}  // namespace newllm
