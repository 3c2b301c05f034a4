// A loop over tasks on a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace spinlock_fast {

// Calls task(i) once for every i in [0, tasks), on up to `threads` threads, the calling one among them, and returns
// when all are done. Which thread meets which task is not determined: results must not depend on it. Where a task throws,
// tasks that have not begun are left out, and the first exception is thrown again on the calling thread. A call made
// while another thread's call is running does its tasks alone, and so does one for which no thread can be started.
void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& task);

// From now on loops run on the threads of an OpenMP runtime: the address of its `GOMP_parallel`, 0 for threads of our own.
// Two sets of threads would take the processor from each other, since those of OpenMP wait busily for their next loop.
void use_openmp(std::uintptr_t gomp_parallel);

}  // namespace spinlock_fast
