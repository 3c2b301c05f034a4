#include "dataset_layout.hpp"

#include <algorithm>
#include <stdexcept>

namespace spinlock_fast {
namespace {

// Above any real chunk or row size; sums and products of a few such values do not overflow.
constexpr std::uint64_t kMaxSize = std::uint64_t{1} << 40;

// Of all shards. Files may declare any number of rows that were never written, which the caller reads.
constexpr std::uint64_t kMaxRows = std::uint64_t{1} << 62;

[[noreturn]] void fail(const std::string& name, const std::string& what) {
    throw std::invalid_argument(name + ": " + what);
}

std::uint64_t product(std::uint64_t start, std::span<const std::uint64_t> factors, const std::string& name) {
    for (const std::uint64_t factor : factors) {
        if (factor == 0) fail(name, "a dimension is 0");
        if (factor > kMaxSize / start) fail(name, "sizes are impossibly large");
        start *= factor;
    }
    return start;
}

std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) { return a / b + (a % b != 0); }

void validate_chunks(const Dataset& dataset, Shard& shard) {
    const auto& name = dataset.name;
    if (shard.chunk_shape.size() != dataset.row_shape.size()) fail(name, "a chunk has other dimensions than a row");
    product(shard.chunk_rows * dataset.item_size, shard.chunk_shape, name);
    if (shard.fill.size() != dataset.item_size) fail(name, "the fill value is not one item");
    shard.grid_columns = 1;
    for (std::size_t d = 0; d < dataset.row_shape.size(); ++d)
        shard.grid_columns *= divide_up(dataset.row_shape[d], shard.chunk_shape[d]);
    if (shard.skipped >= shard.chunk_rows) fail(name, "more rows are skipped than a chunk holds");
    const std::uint64_t chunk_rows = divide_up(shard.rows + shard.skipped, shard.chunk_rows);
    if (chunk_rows > kMaxSize / shard.grid_columns) fail(name, "sizes are impossibly large");
    const std::uint64_t chunks = chunk_rows * shard.grid_columns;
    if (shard.offsets.size() != chunks || shard.sizes.size() != chunks || shard.masks.size() != chunks)
        fail(name, "the index has another size than the grid of chunks");
    for (const Filter& filter : shard.filters)
        if (std::ranges::count(shard.filters, filter.kind, &Filter::kind) > 1) fail(name, "a filter is applied twice");
    if (std::ranges::any_of(shard.filters, [](const Filter& f) { return f.item_size == 0; }))
        fail(name, "shuffle of items of 0 bytes");
}

}  // namespace

std::uint64_t Dataset::chunk_bytes(const Shard& shard) const noexcept {
    if (shard.contiguous) return shard.chunk_rows * row_bytes;
    std::uint64_t bytes = shard.chunk_rows * item_size;
    for (const std::uint64_t size : shard.chunk_shape) bytes *= size;
    return bytes;
}

bool Dataset::stores_whole_rows(const Shard& shard) const noexcept {
    return shard.contiguous || (shard.filters.empty() && shard.chunk_shape == row_shape);
}

std::vector<std::uint64_t> Dataset::chunk_origin(const Shard& shard, std::uint64_t chunk_row,
                                                 std::uint64_t column) const {
    std::vector<std::uint64_t> origin(1 + row_shape.size());
    origin[0] = chunk_row * shard.chunk_rows;
    for (std::size_t d = row_shape.size(); !shard.contiguous && d-- > 0;) {
        const std::uint64_t chunks_across = divide_up(row_shape[d], shard.chunk_shape[d]);
        origin[1 + d] = column % chunks_across * shard.chunk_shape[d];
        column /= chunks_across;
    }
    return origin;
}

void Dataset::validate(std::size_t files) {
    if (item_size == 0 || item_size > 16) fail(name, "items of " + std::to_string(item_size) + " bytes");
    row_bytes = product(item_size, row_shape, name);
    shard_ends.clear();
    std::uint64_t end = 0;
    for (Shard& shard : shards) {
        if (shard.file >= files) fail(name, "a shard names no file");
        if (shard.read_by_caller) {
            if (shard.rows > kMaxRows - std::min(end, kMaxRows)) fail(name, "sizes are impossibly large");
            shard.chunk_rows = std::max(shard.rows, std::uint64_t{1});
            end += shard.rows;
            shard_ends.push_back(end);
            continue;
        }
        if (shard.rows > kMaxSize || shard.chunk_rows == 0 || shard.chunk_rows > kMaxSize / row_bytes)
            fail(name, "sizes are impossibly large");
        if (shard.contiguous) {
            if (shard.offset > kMaxSize * 1024) fail(name, "sizes are impossibly large");
            if (shard.skipped != 0) fail(name, "rows of contiguous data are skipped");
        } else {
            validate_chunks(*this, shard);
        }
        end += shard.rows;
        shard_ends.push_back(end);
    }
}

}  // namespace spinlock_fast
