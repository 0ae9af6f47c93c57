#include "cpu_team.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <type_traits>

#ifdef __linux__
#include <dlfcn.h>
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

// Members come from OpenMP's threads where the process has them, as torch's do: those of torch's last product look for
// work a while longer, and others of ours would have to share their cores with them.
struct OpenMP {
    void (*parallel)(void (*region)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*index)() = nullptr;
    int (*size)() = nullptr;
};

const OpenMP& openmp() {
    static const OpenMP found = [] {
        OpenMP library;
#ifdef __linux__
        // By name: the library is torch's own copy, under whatever name, and this module needs neither.
        const auto find = [](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
            return function != nullptr;
        };
        if (!find(library.index, "omp_get_thread_num") || !find(library.size, "omp_get_num_threads") ||
            !find(library.parallel, "GOMP_parallel")) {
            return OpenMP{};
        }
#endif
        return library;
    }();
    return found;
}

struct Team {
    Body body;
    const void* task;
    Barrier barrier;
    std::mutex failing;
    std::exception_ptr failure;

    void work(int index, int size) {
        try {
            body(task, Member{index, size, &barrier});
        } catch (...) {
            const std::lock_guard<std::mutex> guard(failing);
            if (!failure) failure = std::current_exception();
            barrier.abandon();
        }
    }
};

void as_openmp(void* team) { static_cast<Team*>(team)->work(openmp().index(), openmp().size()); }

void as_threads(Team& team, int threads) {
    std::atomic<int> size{0};  // 0: not known yet, since a thread may fail to start
    auto work = [&](int index) {
        while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        team.work(index, size.load(std::memory_order_relaxed));
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
    Team team{body, task};
    if (threads > 1 && openmp().parallel != nullptr) {
        openmp().parallel(&as_openmp, &team, static_cast<unsigned>(threads), 0);
    } else {
        as_threads(team, threads);
    }
    if (team.failure) std::rethrow_exception(team.failure);
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
