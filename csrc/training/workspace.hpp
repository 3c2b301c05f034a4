// Scratch memory of the threads that run kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "kernels.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <algorithm>
#include <limits>

#include <sanitizer/asan_interface.h>
#endif

namespace spinlock_fast::training {

// Uninitialised memory aligned to cache lines; grows and never shrinks.
class AlignedFloats {
public:
    float* reserve(Index n) {
        if (n > size_) {
            memory_.reset(new (std::align_val_t{64}) float[static_cast<std::size_t>(n)]);
            size_ = n;
        }
        return memory_.get();
    }

private:
    struct Delete {
        void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<float[], Delete> memory_;
    Index size_ = 0;
};

// Allocates a `Workspace` for each thread and keeps it between calls, since allocation costs more than a small task.
class Workspaces {
public:
    Workspaces(Index partial, Index buffer) : partial_(round_up(partial)), buffer_(buffer) {}

    // The workspace of the calling thread. Throws std::bad_alloc.
    Workspace for_this_thread() const {
        thread_local AlignedFloats memory;
        const Kernels& k = kernels();
        const Index sizes[] = {round_up(k.packed_floats), round_up(k.row_floats), partial_, buffer_};
        Index total = 0;
        for (const Index size : sizes) total += size + kGuardFloats;
        float* p = memory.reserve(total);
        float* parts[4];
        for (int i = 0; i < 4; p += sizes[i++] + kGuardFloats) parts[i] = guarded(p, sizes[i]);
        return {parts[0], parts[1], parts[2], parts[3]};
    }

private:
    static Index round_up(Index n) { return (n + 15) / 16 * 16; }

#if defined(__SANITIZE_ADDRESS__)
    // All parts share one allocation: poison the memory between them, and fill them with NaN to expose unwritten
    // values.
    static constexpr Index kGuardFloats = 64;

    static float* guarded(float* part, Index size) {
        ASAN_UNPOISON_MEMORY_REGION(part, static_cast<std::size_t>(size + kGuardFloats) * sizeof(float));
        std::fill(part, part + size, std::numeric_limits<float>::quiet_NaN());
        ASAN_POISON_MEMORY_REGION(part + size, kGuardFloats * sizeof(float));
        return part;
    }
#else
    static constexpr Index kGuardFloats = 0;

    static float* guarded(float* part, Index) { return part; }
#endif

    Index partial_, buffer_;
};

}  // namespace spinlock_fast::training
