// Parallel loops over tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace spinlock_fast {

// Calls task(i) for every i in [0, tasks) on up to `threads` threads, including the calling one, and returns when all
// are done. The assignment of tasks to threads is not deterministic. If a task throws, tasks not yet started are
// skipped and the first exception is rethrown on the calling thread. A call runs on the calling thread alone while
// another thread's call is in progress, or if no thread can be started.
void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& task);

// Runs loops on the threads of an OpenMP runtime, given the address of its `GOMP_parallel`; 0 selects an own pool.
// Two thread pools would compete for the cores, because OpenMP threads spin while they wait for the next loop.
void use_openmp(std::uintptr_t gomp_parallel);

}  // namespace spinlock_fast
