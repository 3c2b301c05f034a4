// One stored chunk to the bytes that it holds.
#pragma once

#include "inflate.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace spinlock_fast {

enum class FilterKind : std::uint8_t { deflate, shuffle, fletcher32 };

struct Filter {
    FilterKind kind;
    std::size_t item_size = 1;  // of shuffle
};

// Memory that grows, never shrinks and is never cleared.
class Scratch {
public:
    std::span<std::byte> take(std::size_t size) {
        if (size > capacity_) {
            bytes_.reset();  // before the larger one is asked for, so that both never exist together
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

// Undoes a pipeline of filters; keeps its memory between chunks, so one belongs to one thread.
class ChunkDecoder {
public:
    // The decoded bytes, valid until the next call.
    //
    // filters: in the order in which the writer applied them, at most one deflate.
    // mask: bit i is set where filter i was skipped for this chunk.
    // chunk_bytes: size of the result; what a chunk holds beyond it is decoded and left out.
    // verify: whether fletcher32 is compared; deflate's own checksum always is.
    // into: memory of `chunk_bytes` for the result, where it is wanted there; else the decoder's own is used.
    //
    // Throws DecodeError. At most 16 MiB beyond `chunk_bytes` are allocated, whatever `stored` says.
    std::span<std::byte> decode(std::span<std::byte> stored, std::uint32_t mask, std::span<const Filter> filters,
                                std::size_t chunk_bytes, bool verify, std::span<std::byte> into = {});

private:
    std::span<std::byte> inflate_longer(std::span<const std::byte> stored, std::size_t expected);

    Inflater inflater_;
    Scratch inflated_;
    Scratch unshuffled_;
};

// The most bytes that a pipeline makes of a chunk, incompressible data and checksums included.
std::size_t max_stored_size(std::size_t chunk_bytes, std::size_t filters) noexcept;

}  // namespace spinlock_fast
