// A team of threads that runs one function and meets at barriers; and memory for it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace newllm {

// What the members of a team share.
class Barrier {
public:
    // Wait until all `size` members have. Throws std::runtime_error when one does not come: waits are bounded.
    void wait(int size);

    // Let every member that waits, now or later, throw.
    void abandon() { abandoned_.store(true, std::memory_order_release); }

private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<bool> abandoned_{false};
};

struct Member {
    int index, size;
    Barrier* barrier;

    void wait() const {
        if (size > 1) barrier->wait(size);
    }
};

using Body = void (*)(const void* task, const Member& member);

// Run `body(task, member)` on up to `threads` threads, the calling one among them: on as many as can be started.
// Throws what the first member threw.
void run_team(int threads, Body body, const void* task);

// Floats on addresses that suit vectors and large pages; freed together.
class Workspace {
public:
    Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace();

    float* floats(int64_t count);
    float* zeros(int64_t count);

private:
    std::vector<void*> blocks_;
};

}  // namespace newllm
