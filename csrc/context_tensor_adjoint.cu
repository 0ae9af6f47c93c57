#include "context_tensor_launch.cuh"

namespace newllm {

template CudaSweepPlan plan_tensor<ContextAdjointArguments>(int64_t, int64_t);
template const char* launch_tensor(const ContextAdjointArguments&, const CudaSweepPlan&, const CudaCall&);

}  // namespace newllm
