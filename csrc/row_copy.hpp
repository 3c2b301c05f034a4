// The part of a chunk that belongs to one row, into its place in that row.
#pragma once

#include "dataset.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace spinlock_fast {

// Where the bytes of a row lie in a chunk and in the row: the same for every row of the chunk.
class RowCopy {
public:
    // origin: of the chunk, as `Dataset::origin` gives it. What overhangs the dataset is left out.
    RowCopy(const Dataset& dataset, const Shard& shard, std::span<const std::uint64_t> origin);

    // Row `row` of the chunk into a row of `Dataset::row_bytes` bytes.
    void operator()(const std::byte* chunk, std::uint64_t row, std::byte* out) const noexcept;

private:
    struct Run {
        std::size_t from, to;
    };
    std::size_t chunk_row_bytes_;
    std::size_t run_bytes_;
    std::vector<Run> runs_;
};

}  // namespace spinlock_fast
