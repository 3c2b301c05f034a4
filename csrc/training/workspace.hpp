// Memory of the threads that run kernels, and addresses that Python hands over.
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

// Memory that starts at a cache line and is not cleared.
class Floats {
public:
    Floats() = default;
    float* reserve(Index n) {
        if (n > size_) {
            memory_.reset(new (std::align_val_t{64}) float[static_cast<std::size_t>(n)]);
            size_ = n;
        }
        return memory_.get();
    }
    float* get() const { return memory_.get(); }

private:
    struct Delete {
        void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<float[], Delete> memory_;
    Index size_ = 0;
};

// The memory of each thread. It is kept from call to call: to ask the system for it anew costs more than many a task.
class Workspaces {
public:
    Workspaces(Index partial, Index buffer) : partial_(rounded(partial)), buffer_(buffer) {}

    // That of the calling thread; throws std::bad_alloc.
    Workspace here() const {
        thread_local Floats memory;
        const Kernels& k = kernels();
        const Index sizes[] = {rounded(k.packed_floats), rounded(k.row_floats), partial_, buffer_};
        Index total = 0;
        for (const Index size : sizes) total += size + kFence;
        float* p = memory.reserve(total);
        float* parts[4];
        for (int i = 0; i < 4; p += sizes[i++] + kFence) parts[i] = fenced(p, sizes[i]);
        return {parts[0], parts[1], parts[2], parts[3]};
    }

private:
    static Index rounded(Index n) { return (n + 15) / 16 * 16; }

#if defined(__SANITIZE_ADDRESS__)
    // The parts lie in one allocation: the sanitizer is told where each ends, and what is not written reads as NaN.
    static constexpr Index kFence = 64;

    static float* fenced(float* part, Index size) {
        ASAN_UNPOISON_MEMORY_REGION(part, static_cast<std::size_t>(size + kFence) * sizeof(float));
        std::fill(part, part + size, std::numeric_limits<float>::quiet_NaN());
        ASAN_POISON_MEMORY_REGION(part + size, kFence * sizeof(float));
        return part;
    }
#else
    static constexpr Index kFence = 0;

    static float* fenced(float* part, Index) { return part; }
#endif

    Index partial_, buffer_;
};

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace spinlock_fast::training
