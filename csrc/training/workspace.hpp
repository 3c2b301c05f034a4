// Memory of the threads that run kernels, and addresses that Python hands over.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "kernels.hpp"

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

    // That of the calling thread.
    Workspace here() const {
        thread_local Floats memory;
        const Kernels& k = kernels();
        const Index packed = rounded(k.packed_floats), rows = rounded(k.row_floats);
        float* p = memory.reserve(packed + rows + partial_ + buffer_);
        return {p, p + packed, p + packed + rows, p + packed + rows + partial_};
    }

private:
    static Index rounded(Index n) { return (n + 15) / 16 * 16; }

    Index partial_, buffer_;
};

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace spinlock_fast::training
