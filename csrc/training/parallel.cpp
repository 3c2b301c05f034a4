#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace spinlock_fast {
namespace {

long process() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

class Pool {
public:
    void run(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& task) {
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int worker = static_cast<int>(workers_.size()) + 1;
            workers_.emplace_back([this, worker] { work(worker); });
        }
        {
            const std::lock_guard lock(mutex_);
            task_ = &task;
            tasks_ = tasks;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = threads - 1;
            working_.store(wanted_, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        take_tasks();
        while (working_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    }

private:
    void take_tasks() {
        for (;;) {
            const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
            if (i >= tasks_) return;
            (*task_)(i);
        }
    }

    // Threads look for the next loop for a moment before they sleep: a training step has a dozen in a row.
    void work(int worker) {
        std::uint64_t seen = 0;
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
            while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
                std::this_thread::yield();
            bool mine;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                seen = round_.load(std::memory_order_relaxed);
                mine = worker <= wanted_;
            }
            if (!mine) continue;
            take_tasks();
            working_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    const std::function<void(std::int64_t)>* task_ = nullptr;
    std::int64_t tasks_ = 0;
    int wanted_ = 0;
    std::atomic<std::int64_t> next_ = 0;
    std::atomic<int> working_ = 0;
    std::atomic<std::uint64_t> round_ = 0;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp = nullptr;
std::atomic<long> gomp_process = 0;  // a forked process has none of its threads

struct Loop {
    const std::function<void(std::int64_t)>& task;
    std::int64_t tasks;
    std::atomic<std::int64_t> next = 0;
};

void run_loop(void* p) {
    Loop& loop = *static_cast<Loop*>(p);
    for (std::int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) loop.task(i);
}

}  // namespace

void use_openmp(std::uintptr_t gomp_parallel) {
    gomp.store(reinterpret_cast<GompParallel>(gomp_parallel));
    gomp_process.store(process());
}

void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& task) {
    // The pool is never destroyed: its threads sleep until the process ends. A forked process has none of them
    // and makes its own.
    static std::mutex busy;
    static Pool* pool = nullptr;
    static long owner = 0;
    threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
    if (const GompParallel parallel = gomp.load(); parallel && threads > 1 && gomp_process.load() == process()) {
        Loop loop{task, tasks};
        parallel(run_loop, &loop, static_cast<unsigned>(threads), 0);
        return;
    }
    std::unique_lock lock(busy, std::defer_lock);
    if (threads <= 1 || !lock.try_lock()) {
        for (std::int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    if (pool == nullptr || owner != process()) {
        pool = new Pool;
        owner = process();
    }
    pool->run(tasks, threads, task);
}

}  // namespace spinlock_fast
