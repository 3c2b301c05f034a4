#include "row_copy.hpp"

#include <algorithm>
#include <cstring>

namespace spinlock_fast {

RowCopy::RowCopy(const Dataset& dataset, const Shard& shard, std::span<const std::uint64_t> origin)
    : chunk_row_bytes_(dataset.item_size), run_bytes_(dataset.item_size), runs_{{0, 0}} {
    std::size_t row_stride = dataset.item_size;
    bool dense = true;  // so far, a run in the chunk is a run in the row
    for (std::size_t d = dataset.row_shape.size(); d-- > 0;) {
        const std::uint64_t across = dataset.row_shape[d], chunk = shard.chunk_shape[d], start = origin[1 + d];
        const std::uint64_t inside = std::min(chunk, across - start);
        for (Run& run : runs_) run.to += start * row_stride;
        if (dense) {
            run_bytes_ *= inside;
        } else {
            const std::vector<Run> once = runs_;
            for (std::uint64_t i = 1; i < inside; ++i)
                for (const Run& run : once)
                    runs_.push_back({run.from + i * chunk_row_bytes_, run.to + i * row_stride});
        }
        dense = dense && inside == chunk && inside == across;
        chunk_row_bytes_ *= chunk;
        row_stride *= across;
    }
}

void RowCopy::operator()(const std::byte* chunk, std::uint64_t row, std::byte* out) const noexcept {
    const std::byte* in = chunk + row * chunk_row_bytes_;
    for (const Run& run : runs_) std::memcpy(out + run.to, in + run.from, run_bytes_);
}

}  // namespace spinlock_fast
