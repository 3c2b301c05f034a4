// Where the rows of a dataset lie: shards one after the other, each contiguous or a grid of chunks.
#pragma once

#include "chunk_decoder.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace spinlock_fast {

// The part of a dataset that lies in one file.
struct Shard {
    std::size_t file = 0;
    std::uint64_t rows = 0;
    // Rows that are stored together. Contiguous: rows that one task reads.
    std::uint64_t chunk_rows = 1;
    bool swapped = false;  // stored in the other byte order

    bool contiguous = false;
    std::uint64_t offset = 0;  // of the first row, where contiguous

    std::vector<std::uint64_t> chunk_shape{};  // of one row; as long as the dataset's row_shape
    std::vector<Filter> filters{};
    std::vector<std::byte> fill{};  // one item in native order, for chunks that were never written
    // By chunk in the order of its grid, rows slowest.
    std::vector<std::uint64_t> offsets{};
    std::vector<std::uint64_t> sizes{};  // stored bytes
    std::vector<std::uint32_t> masks{};

    // Columns of the grid: chunks that share their rows.
    std::uint64_t columns = 1;
};

// The offset of a chunk that was never written.
inline constexpr std::uint64_t kMissing = std::numeric_limits<std::uint64_t>::max();

struct Dataset {
    std::string name{};
    std::size_t item_size = 1;
    std::vector<std::uint64_t> row_shape{};
    std::vector<Shard> shards{};

    // Set by `validate`.
    std::uint64_t row_bytes = 0;
    std::vector<std::uint64_t> ends{};  // of each shard, in rows of the whole

    std::uint64_t rows() const noexcept { return ends.empty() ? 0 : ends.back(); }

    // Bytes of a decoded chunk; contiguous: of the rows that one task reads.
    std::uint64_t chunk_bytes(const Shard& shard) const noexcept;

    // Whether a chunk is a run of whole rows as they stand in the file.
    bool stored_as_rows(const Shard& shard) const noexcept;

    // First row and first position in every dimension of a row, of a chunk.
    std::vector<std::uint64_t> origin(const Shard& shard, std::uint64_t chunk_row, std::uint64_t column) const;

    // Fills what is derived, and throws std::invalid_argument where sizes are zero, overflow or contradict
    // each other: everything that later indexes memory has passed here.
    void validate(std::size_t files);
};

}  // namespace spinlock_fast
