#include "cpu_team.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace newllm {

namespace {

// A member that is late is mostly not running: after so many looks, let others run between them.
constexpr int64_t kSpins = 4096;
// After so many more, which takes minutes, it will not come.
constexpr int64_t kYields = int64_t{1} << 28;
constexpr size_t kLargePage = size_t{1} << 21, kSmallBlock = size_t{1} << 18;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

void Barrier::wait(int size) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int64_t looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
        if (looks < kSpins) {
            pause();
            continue;
        }
        if (abandoned_.load(std::memory_order_acquire) || looks > kYields) {
            abandon();
            throw std::runtime_error("a thread of the sweep was given up: another one failed or did not come");
        }
        std::this_thread::yield();
    }
}

void run_team(int threads, Body body, const void* task) {
    Barrier barrier;
    std::atomic<int> size{0};  // 0: not known yet, since a thread may fail to start
    std::exception_ptr failure;
    std::mutex failing;
    auto work = [&](int index) {
        while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        try {
            body(task, Member{index, size.load(std::memory_order_relaxed), &barrier});
        } catch (...) {
            const std::lock_guard<std::mutex> guard(failing);
            if (!failure) failure = std::current_exception();
            barrier.abandon();
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads > 1 ? threads - 1 : 0));
    try {
        for (int index = 1; index < threads; ++index) others.emplace_back(work, index);
    } catch (const std::system_error&) {
        // Fewer threads do the same work.
    }
    size.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
    work(0);
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

Workspace::Workspace() = default;

Workspace::~Workspace() {
    for (void* block : blocks_) std::free(block);
}

float* Workspace::floats(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    const size_t unit = bytes < kSmallBlock ? 64 : kLargePage;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    blocks_.reserve(blocks_.size() + 1);
    // Aligned here: what aligned_alloc maps is unmapped again, and clearing its pages in every call takes longer than
    // sweeping fifty tokens, while malloc comes to keep such blocks.
    void* whole = std::malloc(rounded + unit);
    if (whole == nullptr) throw std::bad_alloc();
    blocks_.push_back(whole);
    const uintptr_t address = (reinterpret_cast<uintptr_t>(whole) + unit - 1) / unit * unit;
    void* block = reinterpret_cast<void*>(address);
#ifdef __linux__
    if (unit == kLargePage) madvise(block, rounded, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(block);
}

float* Workspace::zeros(int64_t count) {
    float* block = floats(count);
    std::memset(block, 0, static_cast<size_t>(count) * sizeof(float));
    return block;
}

}  // namespace newllm
