#include "row_source.hpp"

#include "byte_filters.hpp"
#include "row_copy.hpp"

#include <algorithm>
#include <cstring>
#include <ctime>

namespace spinlock_fast {
namespace {

// From this size on a read of its own costs less than a copy through scratch memory.
constexpr std::uint64_t kDirectBytes = 16 * 1024;

double thread_seconds() noexcept {
    struct timespec now {};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The number of rows, from the first on, that follow each other in the file and in memory.
std::size_t joined(std::span<const RowTarget> rows, std::uint64_t row_bytes) noexcept {
    std::size_t n = 1;
    while (n < rows.size() && rows[n].row == rows[n - 1].row + 1 && rows[n].out == rows[n - 1].out + row_bytes) ++n;
    return n;
}

}  // namespace

RowSource::RowSource(std::vector<FileName> files, std::vector<Dataset> datasets, bool verify_checksums)
    : files_(std::move(files)), datasets_(std::move(datasets)), verify_checksums_(verify_checksums) {
    for (Dataset& dataset : datasets_) dataset.validate(files_.size());
}

ChunkPlace RowSource::chunk_of(std::size_t dataset, std::uint64_t row) const {
    const Dataset& found = datasets_[dataset];
    // The first shard that ends after the row: empty shards are passed over.
    const auto end = std::ranges::upper_bound(found.ends, row);
    const auto index = static_cast<std::size_t>(end - found.ends.begin());
    const Shard& shard = found.shards[index];
    const std::uint64_t start = *end - shard.rows;
    const std::uint64_t chunk_row = (row - start) / shard.chunk_rows;
    const std::uint64_t first = chunk_row * shard.chunk_rows;
    return {.dataset = dataset,
            .shard = index,
            .chunk_row = chunk_row,
            .first_row = start + first,
            .rows = std::min(shard.chunk_rows, shard.rows - first)};
}

void RowSource::read(const ChunkPlace& place, Decoding& decoding) {
    const double started = thread_seconds();
    const Dataset& dataset = datasets_[place.dataset];
    const Shard& shard = this->shard(place);
    if (shard.contiguous) {
        const auto file = files_.get(shard.file);
        read_rows(place, *file, shard.offset + place.chunk_row * shard.chunk_rows * dataset.row_bytes, decoding);
        file->check_unchanged();
    } else if (const auto chunk = place.chunk_row * shard.columns + place.column; shard.offsets[chunk] == kMissing) {
        read_chunk(place, nullptr, decoding);
    } else {
        const auto file = files_.get(shard.file);
        try {
            if (dataset.stored_as_rows(shard) && shard.sizes[chunk] == dataset.chunk_bytes(shard))
                read_rows(place, *file, shard.offsets[chunk], decoding);
            else
                read_chunk(place, file.get(), decoding);
        } catch (const DecodeError&) {
            file->check_unchanged();  // the better reason, where it is one
            throw;
        }
        file->check_unchanged();
    }
    ++decoding.stats.chunks;
    decoding.stats.cpu_seconds += thread_seconds() - started;
}

// Rows that stand in the file as they are, from byte `offset` on.
void RowSource::read_rows(const ChunkPlace& place, const File& file, std::uint64_t offset,
                          Decoding& decoding) const {
    const Dataset& dataset = datasets_[place.dataset];
    const std::uint64_t row_bytes = dataset.row_bytes;
    const std::span<const RowTarget> rows = decoding.rows;
    const auto count_bytes = [&](std::uint64_t bytes) {
        decoding.stats.stored_bytes += bytes;
        decoding.stats.decoded_bytes += bytes;
    };
    std::size_t runs = 0;
    for (std::size_t i = 0; i < rows.size(); i += joined(rows.subspan(i), row_bytes)) ++runs;
    if (rows.size() * row_bytes / runs >= kDirectBytes) {
        for (std::size_t i = 0; i < rows.size();) {
            const std::size_t n = joined(rows.subspan(i), row_bytes);
            file.read({rows[i].out, n * row_bytes}, offset + rows[i].row * row_bytes);
            count_bytes(n * row_bytes);
            i += n;
        }
    } else {
        const std::uint64_t first = rows.front().row, span = rows.back().row + 1 - first;
        const auto all = decoding.stored.take(span * row_bytes);
        file.read(all, offset + first * row_bytes);
        count_bytes(all.size());
        for (const auto& [row, out] : rows) std::memcpy(out, all.data() + (row - first) * row_bytes, row_bytes);
    }
    if (shard(place).swapped)
        for (const auto& target : rows) swap_bytes({target.out, row_bytes}, dataset.item_size);
}

// A chunk that is decoded whole; without a file, one of fill values.
void RowSource::read_chunk(const ChunkPlace& place, const File* file, Decoding& decoding) const {
    const Dataset& dataset = datasets_[place.dataset];
    const Shard& shard = this->shard(place);
    const std::uint64_t chunk_bytes = dataset.chunk_bytes(shard);
    // Whole rows that follow each other in the batch, as they do when reading in order, are decoded in place.
    std::span<std::byte> into;
    if (shard.chunk_shape == dataset.row_shape && decoding.rows.size() == shard.chunk_rows &&
        joined(decoding.rows, dataset.row_bytes) == shard.chunk_rows)
        into = {decoding.rows.front().out, chunk_bytes};
    std::span<std::byte> data;
    if (file == nullptr) {
        data = decoding.stored.take(chunk_bytes);
        for (std::size_t i = 0; i < data.size(); i += shard.fill.size())
            std::memcpy(data.data() + i, shard.fill.data(), shard.fill.size());
    } else {
        const std::size_t chunk = place.chunk_row * shard.columns + place.column;
        const std::uint64_t size = shard.sizes[chunk];
        // Checked before memory is asked for: the size comes from the file.
        if (size > max_stored_size(chunk_bytes, shard.filters.size()))
            throw DecodeError(std::to_string(size) + " stored bytes are too many for a chunk of " +
                              std::to_string(chunk_bytes));
        const auto stored = decoding.stored.take(size);
        file->read(stored, shard.offsets[chunk]);
        data = decoding.decoder.decode(stored, shard.masks[chunk], shard.filters, chunk_bytes, verify_checksums_, into);
        if (shard.swapped) swap_bytes(data, dataset.item_size);
        decoding.stats.stored_bytes += size;
    }
    decoding.stats.decoded_bytes += chunk_bytes;
    if (!into.empty() && data.data() == into.data()) return;
    const RowCopy copy(dataset, shard, dataset.origin(shard, place.chunk_row, place.column));
    for (const auto& [row, out] : decoding.rows) copy(data.data(), row, out);
}

std::string RowSource::describe(const ChunkPlace& place) const {
    const Dataset& dataset = datasets_[place.dataset];
    const Shard& shard = this->shard(place);
    const std::uint64_t first = place.chunk_row * shard.chunk_rows;
    const std::string rows =
        "rows " + std::to_string(first) + ".." + std::to_string(first + place.rows - 1);
    std::string text = files_.name(shard.file).label + ": " + dataset.name + ": ";
    std::uint64_t offset = shard.offset + first * dataset.row_bytes;
    if (shard.contiguous) {
        text += rows;
    } else {
        text += "chunk [";
        for (const std::uint64_t start : dataset.origin(shard, place.chunk_row, place.column))
            text += std::to_string(start) + ", ";
        text.resize(text.size() - 2);
        text += "] (" + rows + ")";
        offset = shard.offsets[place.chunk_row * shard.columns + place.column];
    }
    return offset == kMissing ? text : text + " at byte " + std::to_string(offset);
}

}  // namespace spinlock_fast
