#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace spinlock_fast {
namespace {

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

using Task = std::function<void(std::int64_t)>;

// The tasks of one call of `parallel_for`. Exceptions are caught: one that leaves a worker thread ends the process.
class Loop {
public:
    Loop(std::int64_t tasks, const Task& task) : tasks_(tasks), task_(task) {}

    // Runs tasks until none is left. Called by all threads of the loop.
    void run_tasks() noexcept {
        try {
            for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(i);
        } catch (...) {
            next_.store(tasks_, std::memory_order_relaxed);
            const std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    // Call after all threads are done.
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    const std::int64_t tasks_;
    const Task& task_;
    std::atomic<std::int64_t> next_ = 0;
    std::mutex mutex_;
    std::exception_ptr error_;
};

class Pool {
public:
    // Runs the loop on `threads` threads, or on as many as could be started.
    void run(Loop& loop, int threads) {
        const int count = start_workers(threads - 1);
        {
            const std::lock_guard lock(mutex_);
            loop_ = &loop;
            active_workers_ = count;
            working_.store(active_workers_, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        loop.run_tasks();
        while (working_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    }

private:
    // Starts missing workers; returns how many of `count` exist.
    int start_workers(int count) {
        try {
            while (static_cast<int>(workers_.size()) < count) {
                const int worker = static_cast<int>(workers_.size()) + 1;
                workers_.reserve(workers_.size() + 1);  // emplace_back must not throw after the thread started
                workers_.emplace_back([this, worker] { worker_loop(worker); });
            }
        } catch (const std::system_error&) {  // no more threads: use those that exist
        } catch (const std::bad_alloc&) {
        }
        return std::min(count, static_cast<int>(workers_.size()));
    }

    // Spins for 50 us before sleeping: a training step runs a dozen loops in a row.
    void worker_loop(int worker) {
        std::uint64_t seen = 0;
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
            while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
                std::this_thread::yield();
            Loop* loop;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                seen = round_.load(std::memory_order_relaxed);
                loop = worker <= active_workers_ ? loop_ : nullptr;
            }
            if (!loop) continue;
            loop->run_tasks();
            working_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    Loop* loop_ = nullptr;
    int active_workers_ = 0;
    std::atomic<int> working_ = 0;
    std::atomic<std::uint64_t> round_ = 0;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp = nullptr;
std::atomic<long> gomp_process = 0;  // the threads do not exist in a forked process

void run_tasks_of(void* loop) { static_cast<Loop*>(loop)->run_tasks(); }

}  // namespace

void use_openmp(std::uintptr_t gomp_parallel) {
    gomp.store(reinterpret_cast<GompParallel>(gomp_parallel));
    gomp_process.store(process_id());
}

void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& task) {
    // The pool is never destroyed: its threads sleep until the process ends. A forked process creates its own pool.
    static std::mutex busy;
    static Pool* pool = nullptr;
    static long owner = 0;
    threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
    if (const GompParallel parallel = gomp.load(); parallel && threads > 1 && gomp_process.load() == process_id()) {
        Loop loop(tasks, task);
        parallel(run_tasks_of, &loop, static_cast<unsigned>(threads), 0);
        loop.rethrow();
        return;
    }
    std::unique_lock lock(busy, std::defer_lock);
    if (threads <= 1 || !lock.try_lock()) {
        for (std::int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    if (pool == nullptr || owner != process_id()) {
        pool = new Pool;
        owner = process_id();
    }
    Loop loop(tasks, task);
    pool->run(loop, threads);
    loop.rethrow();
}

}  // namespace spinlock_fast
