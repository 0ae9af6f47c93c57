// Blocks of a grid that exchange vectors through global memory, on any device: all of them have to be running (a
// cooperative launch sees to that).
//
// A number travels in one word of 8 bytes together with the number of its exchange, so that who finds it knows whether
// it is the one that he waits for. That needs no counters and no fences, and one way through memory.
#pragma once

#include "cuda_cluster.cuh"

namespace newllm {

using Packet = unsigned long long;

struct PacketPair {
    Packet first, second;
};

__device__ __forceinline__ void post_packet(Packet* place, float value, uint32_t exchange) {
    const Packet packet = Packet(exchange) << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(place), "l"(packet) : "memory");
}

// Two neighbours, of which the first lies at a multiple of 16 bytes.
__device__ __forceinline__ PacketPair read_packets(const Packet* place) {
    PacketPair pair;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(pair.first), "=l"(pair.second)
                 : "l"(place)
                 : "memory");
    return pair;
}

// A copy into shared memory that goes on while the thread does, until it comes to await_copies.
__device__ __forceinline__ void copy_ahead(float* shared, const float* global) {
    const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(global) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ bool belongs(Packet packet, uint32_t exchange) { return packet >> 32 == exchange; }
__device__ __forceinline__ float value_of(Packet packet) { return __uint_as_float(static_cast<uint32_t>(packet)); }

}  // namespace newllm
