// parallel_for: runs every task once, rethrows exceptions on the calling thread, and survives failed allocations.
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>

#include "parallel.hpp"
#include "training_cases.hpp"
#include "workspace.hpp"

using namespace spinlock_fast;
using namespace spinlock_fast::testing;

namespace {

// Aligned allocations of at least this many bytes fail.
std::atomic<std::size_t> refused_from = static_cast<std::size_t>(-1);

}  // namespace

void* operator new[](std::size_t size, std::align_val_t alignment) {
    const auto align = static_cast<std::size_t>(alignment);
    void* p = size >= refused_from.load() ? nullptr : std::aligned_alloc(align, (size + align - 1) / align * align);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }

namespace {

// Replacement for GOMP_parallel: runs the function on `threads` threads, including the calling one.
void run_on_threads(void (*function)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, data);
    function(data);
    for (std::thread& other : others) other.join();
}

void parallel_for_runs_every_task_once() {
    for (const int threads : {1, 2, 5})
        for (const int tasks : {0, 1, 3, 1000}) {
            std::vector<std::atomic<int>> done(static_cast<std::size_t>(tasks));
            parallel_for(tasks, threads, [&](std::int64_t i) { ++done[static_cast<std::size_t>(i)]; });
            for (const auto& count : done) CHECK(count == 1);
        }
}

void parallel_for_rethrows_exceptions() {
    for (const int threads : {1, 2, 5})
        for (const std::int64_t bad : {0, 7, 999}) {
            const auto fails = [&](std::int64_t i) {
                if (i >= bad) throw std::runtime_error("task " + std::to_string(i));
            };
            CHECK_THROWS(std::runtime_error, "task ", parallel_for(1000, threads, fails));
            std::atomic<int> done = 0;  // the threads run the next loop
            parallel_for(100, threads, [&](std::int64_t) { ++done; });
            CHECK(done == 100);
        }
}

// Concurrent calls: the second runs on its calling thread alone.
void concurrent_calls_run_all_tasks() {
    std::atomic<int> done = 0;
    const auto calls = [&] {
        for (int i = 0; i < 50; ++i) parallel_for(20, 3, [&](std::int64_t) { ++done; });
    };
    std::thread other(calls);
    calls();
    other.join();
    CHECK(done == 2000);
}

void operations_throw_bad_alloc() {
    const Shape shape{64, 700, 40, 300, {600, 5}, {9, 4}, {50, 9}, {7, 3}, false, 0.1};
    refused_from = 64 * 1024;
    CHECK_THROWS(std::bad_alloc, "bad_alloc", two_layers(shape, 1, false, false));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", two_layers(shape, 1, true, true));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", projections(shape, 1));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", decoders(shape, 1, true));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", nearest(shape, 1, true, true));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", residual(shape, 1, false, 2));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", joint_search(shape, 1, true));
    CHECK_THROWS(std::bad_alloc, "bad_alloc", topographic(shape, 1));
    refused_from = static_cast<std::size_t>(-1);
    CHECK(two_layers(shape, 1, false, false)[1] == two_layers(shape, 3, false, false)[1]);
}

// Each call needs more memory than any thread has, so that the first task fails on every thread.
void failed_workspace_allocation_reaches_the_caller() {
    static Index buffer = 1 << 20;
    for (const int threads : {1, 2, 5}) {
        const training::Workspaces workspaces(0, buffer *= 2);
        refused_from = 64 * 1024;
        CHECK_THROWS(std::bad_alloc, "bad_alloc",
                     parallel_for(40, threads, [&](std::int64_t) { static_cast<void>(workspaces.for_this_thread()); }));
        refused_from = static_cast<std::size_t>(-1);
        std::atomic<int> done = 0;
        parallel_for(40, threads, [&](std::int64_t) {
            if (workspaces.for_this_thread().buffer) ++done;
        });
        CHECK(done == 40);
    }
}

}  // namespace

int main() {
    std::thread(operations_throw_bad_alloc).join();  // a thread without workspace
    failed_workspace_allocation_reaches_the_caller();
    parallel_for_runs_every_task_once();
    parallel_for_rethrows_exceptions();
    concurrent_calls_run_all_tasks();
    use_openmp(reinterpret_cast<std::uintptr_t>(&run_on_threads));
    failed_workspace_allocation_reaches_the_caller();
    parallel_for_runs_every_task_once();
    parallel_for_rethrows_exceptions();
    concurrent_calls_run_all_tasks();
    use_openmp(0);
    return 0;
}
