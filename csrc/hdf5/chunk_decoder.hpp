// Decodes a stored chunk: inverts its pipeline of filters.
#pragma once

#include "filters.hpp"

#include <cstddef>
#include <cstdint>
#include <array>
#include <span>

namespace spinlock_fast {

// Inverts a pipeline of filters. Not thread-safe: its memory is reused between chunks.
class ChunkDecoder {
public:
    // Returns the decoded bytes, valid until the next call.
    //
    // filters: in the order of writing, each kind at most once.
    // mask: bit i set means that filter i was skipped for this chunk.
    // chunk_bytes: size of the result; additional decoded bytes are dropped.
    // verify: compare the fletcher32 checksum; checksums of deflate and zstd are always verified.
    // destination: `chunk_bytes` of memory for the result; if empty, the decoder's own memory is used.
    //
    // Throws DecodeError and UnsupportedError. Each of its blocks of memory is at most 16 MiB larger than `chunk_bytes`,
    // whatever `stored` contains.
    std::span<std::byte> decode(std::span<std::byte> stored, std::uint32_t mask, std::span<const Filter> filters,
                                std::size_t chunk_bytes, bool verify, std::span<std::byte> destination = {});

private:
    std::span<std::byte> next_buffer(std::span<const std::byte> data, std::size_t size);
    std::span<std::byte> decompress_to(const Filter& filter, std::span<const std::byte> data, std::size_t expected,
                                       std::span<std::byte> destination);

    Codecs codecs_;
    std::array<Scratch, 2> buffers_;  // input and output of a filter alternate
};

// Upper bound of the stored size of a chunk, including incompressible data and checksums.
std::size_t max_stored_size(std::size_t chunk_bytes, std::span<const Filter> filters) noexcept;

}  // namespace spinlock_fast
