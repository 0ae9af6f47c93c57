// A thread-block cluster (sm_90 and later): addresses in other blocks' shared memory, and messages to them.
//
// A message is 16 bytes of data and the news of their arrival in one: it lands in the receiver's shared memory and
// counts its bytes on a barrier beside it, so that nobody waits for more than the bytes expected.
#pragma once

#include <cstdint>

namespace newllm {

using SharedAddress = uint32_t;

// A wait longer than this (cycles, about 20 s) means that a message will never come; the kernel then gives up. On a
// device that serves another process too, or under a tool that checks each access, seconds pass before one comes.
constexpr long long kPatience = 1LL << 35;

__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// Says that a wait was too long, or where nobody would listen, ends the kernel with an error.
__device__ __forceinline__ void give_up(int* timeout) {
    if (timeout == nullptr) __trap();
    *timeout = 1;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define NEWLLM_CLUSTERS

__device__ __forceinline__ SharedAddress shared_address(const void* local) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(local));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where block `rank` keeps what this block keeps at `local`.
__device__ __forceinline__ SharedAddress remote_address(const void* local, uint32_t rank) {
    SharedAddress address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
    return address;
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ bool barrier_done(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void send(SharedAddress data, float4 value, SharedAddress barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(data),
        "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
        : "memory");
}

// Sends the block's message to every block of the cluster, as its part of the vector there; by all of its threads.
template <int quads, int threads, int most_blocks>
__device__ __forceinline__ void broadcast(float4* vector, const float4* message, uint64_t* barrier) {
    const int blocks = cluster_size(), rank = cluster_rank();
#pragma unroll
    for (int k = 0; k < (most_blocks * quads + threads - 1) / threads; k++) {
        const int i = k * threads + threadIdx.x, quad = i % quads;
        if (i >= blocks * quads) break;
        const int peer = (i / quads + rank) & (blocks - 1);  // not all to the same one at once
        send(remote_address(vector + rank * quads + quad, peer), message[quad], remote_address(barrier, peer));
    }
}

// What this thread wrote to its shared memory will be seen by copies that are begun after the next __syncthreads.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A copy of this block's shared memory, of a multiple of 16 bytes; it goes on while the thread does.
__device__ __forceinline__ void copy(SharedAddress data, const void* local, uint32_t bytes, SharedAddress barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(data),
        "r"(shared_address(local)), "r"(bytes), "r"(barrier)
        : "memory");
}

// Whether the bytes came; false after kPatience cycles.
__device__ __forceinline__ bool barrier_wait(uint64_t* barrier, uint32_t parity) {
    if (barrier_done(barrier, parity)) return true;
    const long long since = clock64();
    while (!barrier_done(barrier, parity))
        if (clock64() - since > kPatience) return false;
    return true;
}

// The end of a block: no other may still send to one that is gone. `alive` is the same for all of a warp, which has to
// come to the others together.
__device__ __forceinline__ void leave(bool alive, int* timeout) {
    if (!alive) give_up(timeout);
    cluster_sync();
}

#endif

}  // namespace newllm
