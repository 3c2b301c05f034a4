// Copies the part of a row that a chunk holds to its position in the row.
#pragma once

#include "dataset_layout.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace spinlock_fast {

// Byte ranges of a row in a chunk and in the full row; the same for every row of the chunk.
class RowCopy {
public:
    // chunk_origin: result of `Dataset::chunk_origin`. Items outside the dataset (edge chunks) are skipped.
    RowCopy(const Dataset& dataset, const Shard& shard, std::span<const std::uint64_t> chunk_origin);

    // Copies row `row` of the chunk to `out`, a row of `Dataset::row_bytes` bytes.
    void operator()(const std::byte* chunk, std::uint64_t row, std::byte* out) const noexcept;

private:
    struct ByteRange {
        std::size_t chunk_offset, row_offset;
    };
    std::size_t chunk_row_bytes_;
    std::size_t range_bytes_;
    std::vector<ByteRange> ranges_;
};

}  // namespace spinlock_fast
