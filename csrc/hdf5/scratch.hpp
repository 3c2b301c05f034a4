// Reusable memory of decoders.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace spinlock_fast {

// Uninitialised memory that grows and never shrinks.
class Scratch {
public:
    std::span<std::byte> reserve(std::size_t size) {
        if (size > capacity_) {
            bytes_.reset();  // free first, so that both blocks never exist at once
            capacity_ = 0;
            bytes_ = std::make_unique_for_overwrite<std::byte[]>(size);
            capacity_ = size;
        }
        return {bytes_.get(), size};
    }

private:
    std::unique_ptr<std::byte[]> bytes_;
    std::size_t capacity_ = 0;
};

}  // namespace spinlock_fast
