// Launching kernels on thread-block clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace newllm {

// Makes a device current, and the earlier one again.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status_ == cudaSuccess) cudaSetDevice(before_);
    }
    cudaError_t status() const { return status_; }

  private:
    int before_ = 0;
    cudaError_t status_;
};

// Blocks of the smallest cluster: compute-sanitizer takes messages of a block to itself for errors.
constexpr int kFewestBlocks = 2;

struct ClusterLaunch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};

    ClusterLaunch(int clusters, int cluster_blocks, int threads, size_t shared, void* stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = cluster_blocks;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(clusters * cluster_blocks);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

// Lets a kernel have clusters of more than eight blocks, and that much shared memory.
template <class Kernel>
cudaError_t allow(Kernel kernel, size_t shared) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

// The shared memory that a block of a kernel may ask for on the current device.
template <class Kernel>
cudaError_t most_shared(Kernel kernel, size_t& most) {
    int device = 0, whole = 0;
    cudaFuncAttributes own{};
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&whole, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&own, kernel);
    if (status == cudaSuccess) most = static_cast<size_t>(whole) - own.sharedSizeBytes;
    return status;
}

// Null, or why the current device cannot run such clusters; at_once: how many it can at a time.
template <class Kernel>
const char* count_clusters(Kernel kernel, int cluster_blocks, int threads, size_t shared, int& at_once) {
    size_t most = 0;
    cudaError_t status = most_shared(kernel, most);
    if (status == cudaSuccess && shared > most) return "a block wants more shared memory than the device has";
    if (status == cudaSuccess) status = allow(kernel, shared);
    if (status == cudaSuccess) {
        const ClusterLaunch launch(1, cluster_blocks, threads, shared, nullptr);
        status = cudaOccupancyMaxActiveClusters(&at_once, kernel, &launch.config);
    }
    if (status == cudaSuccess && at_once > 0) return nullptr;
    cudaGetLastError();
    return status == cudaSuccess ? "no cluster of this size fits the device" : cudaGetErrorString(status);
}

}  // namespace newllm
