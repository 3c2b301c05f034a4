#include "row_copy.hpp"

#include <algorithm>
#include <cstring>

namespace spinlock_fast {

RowCopy::RowCopy(const Dataset& dataset, const Shard& shard, std::span<const std::uint64_t> chunk_origin)
    : chunk_row_bytes_(dataset.item_size), range_bytes_(dataset.item_size), ranges_{{0, 0}} {
    std::size_t row_stride = dataset.item_size;
    bool dense = true;  // all inner dimensions are contiguous both in the chunk and in the row
    for (std::size_t d = dataset.row_shape.size(); d-- > 0;) {
        const std::uint64_t row_size = dataset.row_shape[d], chunk = shard.chunk_shape[d], start = chunk_origin[1 + d];
        const std::uint64_t inside = std::min(chunk, row_size - start);
        for (ByteRange& range : ranges_) range.row_offset += start * row_stride;
        if (dense) {
            range_bytes_ *= inside;
        } else {
            const std::vector<ByteRange> inner = ranges_;
            for (std::uint64_t i = 1; i < inside; ++i)
                for (const ByteRange& range : inner)
                    ranges_.push_back({range.chunk_offset + i * chunk_row_bytes_, range.row_offset + i * row_stride});
        }
        dense = dense && inside == chunk && inside == row_size;
        chunk_row_bytes_ *= chunk;
        row_stride *= row_size;
    }
}

void RowCopy::operator()(const std::byte* chunk, std::uint64_t row, std::byte* out) const noexcept {
    const std::byte* in = chunk + row * chunk_row_bytes_;
    for (const ByteRange& range : ranges_) std::memcpy(out + range.row_offset, in + range.chunk_offset, range_bytes_);
}

}  // namespace spinlock_fast
