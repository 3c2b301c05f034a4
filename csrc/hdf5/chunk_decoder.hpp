// Decodes a stored chunk: inverts its pipeline of filters.
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
    std::size_t item_size = 1;  // for shuffle
};

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

// Inverts a pipeline of filters. Not thread-safe: its memory is reused between chunks.
class ChunkDecoder {
public:
    // Returns the decoded bytes, valid until the next call.
    //
    // filters: in the order of writing, at most one deflate.
    // mask: bit i set means that filter i was skipped for this chunk.
    // chunk_bytes: size of the result; additional decoded bytes are dropped.
    // verify: compare the fletcher32 checksum; the checksum of deflate is always verified.
    // destination: `chunk_bytes` of memory for the result; if empty, the decoder's own memory is used.
    //
    // Throws DecodeError. Allocates at most 16 MiB beyond `chunk_bytes`, whatever `stored` contains.
    std::span<std::byte> decode(std::span<std::byte> stored, std::uint32_t mask, std::span<const Filter> filters,
                                std::size_t chunk_bytes, bool verify, std::span<std::byte> destination = {});

private:
    std::span<std::byte> inflate_oversized(std::span<const std::byte> stored, std::size_t expected);

    Inflater inflater_;
    Scratch inflated_;
    Scratch unshuffled_;
};

// Upper bound of the stored size of a chunk, including incompressible data and checksums.
std::size_t max_stored_size(std::size_t chunk_bytes, std::size_t filters) noexcept;

}  // namespace spinlock_fast
