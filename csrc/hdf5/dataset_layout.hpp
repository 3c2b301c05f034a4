// File positions of the rows of a dataset: a sequence of shards, each contiguous or a grid of chunks.
#pragma once

#include "chunk_decoder.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace spinlock_fast {

// Consecutive rows of a dataset that are stored in one dataset of a file, or that the caller reads.
struct Shard {
    std::size_t file = 0;
    std::uint64_t rows = 0;
    std::uint64_t chunk_rows = 1;  // rows per chunk; contiguous: rows per read task
    bool byte_swapped = false;     // stored in the non-native byte order
    std::uint64_t skipped = 0;     // rows of the first chunk that precede the first row
    std::uint64_t preceding = 0;   // rows in the file before the first chunk, for messages

    bool read_by_caller = false;  // has no layout, and the reader skips its rows
    bool contiguous = false;
    std::uint64_t offset = 0;  // contiguous: byte offset of the first row

    std::vector<std::uint64_t> chunk_shape{};  // chunk size in each dimension of a row
    std::vector<Filter> filters{};             // in the order of writing
    std::vector<std::byte> fill{};             // one item in native byte order, for unwritten chunks
    // One entry per chunk in C order of the grid (rows slowest):
    std::vector<std::uint64_t> offsets{};  // bytes
    std::vector<std::uint64_t> sizes{};    // stored bytes
    std::vector<std::uint32_t> masks{};    // filter masks

    std::uint64_t grid_columns = 1;  // chunks that together hold the same rows
};

// Offset of a chunk that was never written.
inline constexpr std::uint64_t kUnwrittenChunk = std::numeric_limits<std::uint64_t>::max();

struct Dataset {
    std::string name{};
    std::size_t item_size = 1;
    std::vector<std::uint64_t> row_shape{};
    std::vector<Shard> shards{};

    // Set by `validate`.
    std::uint64_t row_bytes = 0;
    std::vector<std::uint64_t> shard_ends{};  // cumulative number of rows

    std::uint64_t rows() const noexcept { return shard_ends.empty() ? 0 : shard_ends.back(); }

    // Bytes of a decoded chunk; contiguous: of the rows of one read task.
    std::uint64_t chunk_bytes(const Shard& shard) const noexcept;

    // Whether the file stores whole rows unfiltered, one after another.
    bool stores_whole_rows(const Shard& shard) const noexcept;

    // Coordinates of the first item of a chunk: row in the shard, then position in each dimension of the row.
    std::vector<std::uint64_t> chunk_origin(const Shard& shard, std::uint64_t chunk_row, std::uint64_t column) const;

    // Sets the derived fields. Throws std::invalid_argument if sizes are zero, overflow or are inconsistent: all
    // values that later index memory are checked here.
    void validate(std::size_t files);
};

}  // namespace spinlock_fast
