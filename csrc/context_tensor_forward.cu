#include "context_tensor_launch.cuh"

namespace newllm {

template CudaSweepPlan plan_tensor<ContextForwardArguments>(int64_t, int64_t);
template const char* launch_tensor(const ContextForwardArguments&, const CudaSweepPlan&, const CudaCall&);

}  // namespace newllm
