#include "chunk_reader.hpp"

#include "byte_filters.hpp"
#include "row_copy.hpp"

#include <algorithm>
#include <cstring>
#include <ctime>

namespace spinlock_fast {
namespace {

// Rows of at least this many bytes are read into place; smaller ones are read together and copied.
constexpr std::uint64_t kMinDirectRead = 16 * 1024;

double thread_seconds() noexcept {
    struct timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Number of leading rows that are consecutive both in the file and in memory.
std::size_t consecutive_rows(std::span<const RowDestination> rows, std::uint64_t row_bytes) noexcept {
    std::size_t n = 1;
    while (n < rows.size() && rows[n].row == rows[n - 1].row + 1 && rows[n].out == rows[n - 1].out + row_bytes) ++n;
    return n;
}

}  // namespace

ChunkReader::ChunkReader(std::vector<FileInfo> files, std::vector<Dataset> datasets, bool verify_checksums)
    : files_(std::move(files)), datasets_(std::move(datasets)), verify_checksums_(verify_checksums) {
    for (Dataset& dataset : datasets_) dataset.validate(files_.size());
}

ChunkLocation ChunkReader::chunk_of(std::size_t dataset, std::uint64_t row) const {
    const Dataset& layout = datasets_[dataset];
    // upper_bound skips empty shards.
    const auto end = std::ranges::upper_bound(layout.shard_ends, row);
    const auto index = static_cast<std::size_t>(end - layout.shard_ends.begin());
    const Shard& shard = layout.shards[index];
    const std::uint64_t start = *end - shard.rows;
    const std::uint64_t chunk_row = (row - start + shard.skipped) / shard.chunk_rows;
    const std::uint64_t skipped = chunk_row == 0 ? shard.skipped : 0;
    const std::uint64_t first = chunk_row == 0 ? 0 : chunk_row * shard.chunk_rows - shard.skipped;
    return {.dataset = dataset,
            .shard = index,
            .chunk_row = chunk_row,
            .first_row = start + first,
            .rows = std::min(shard.chunk_rows - skipped, shard.rows - first),
            .skipped = skipped};
}

void ChunkReader::read(const ChunkLocation& location, DecodeState& state) {
    const double started = thread_seconds();
    const Dataset& dataset = datasets_[location.dataset];
    const Shard& shard = this->shard(location);
    if (shard.contiguous) {
        const auto file = files_.get(shard.file);
        read_rows(location, *file, shard.offset + location.chunk_row * shard.chunk_rows * dataset.row_bytes, state);
        file->check_unchanged();
    } else if (const auto chunk = location.chunk_row * shard.grid_columns + location.column;
               shard.offsets[chunk] == kUnwrittenChunk) {
        read_chunk(location, nullptr, state);
    } else {
        const auto file = files_.get(shard.file);
        try {
            if (dataset.stores_whole_rows(shard) && shard.sizes[chunk] == dataset.chunk_bytes(shard))
                read_rows(location, *file, shard.offsets[chunk], state);
            else
                read_chunk(location, file.get(), state);
        } catch (const DecodeError&) {
            file->check_unchanged();  // if the file changed, that is the cause to report
            throw;
        }
        file->check_unchanged();
    }
    ++state.stats.chunks;
    state.stats.cpu_seconds += thread_seconds() - started;
}

bool ChunkReader::read_cached(std::uint64_t first_row, std::uint64_t count,
                              std::span<const std::span<std::byte>> memory, ReaderStats& stats) {
    const double started = thread_seconds();
    for (std::size_t d = 0; d < datasets_.size(); ++d) {
        const Dataset& dataset = datasets_[d];
        std::byte* out = memory[d].data();
        for (std::uint64_t row = first_row; row < first_row + count;) {
            const auto end = std::ranges::upper_bound(dataset.shard_ends, row);
            const Shard& shard = dataset.shards[static_cast<std::size_t>(end - dataset.shard_ends.begin())];
            if (!shard.contiguous) return false;
            const std::uint64_t rows = std::min(first_row + count, *end) - row;
            const std::span<std::byte> part(out, rows * dataset.row_bytes);
            try {
                const auto file = files_.get(shard.file);
                const std::uint64_t row_in_shard = row - (*end - shard.rows);
                if (!file->read_cached(part, shard.offset + row_in_shard * dataset.row_bytes)) return false;
                file->check_unchanged();
            } catch (const ReadError&) {
                return false;
            }
            if (shard.byte_swapped) swap_bytes(part, dataset.item_size);
            ++stats.chunks;
            stats.stored_bytes += part.size();
            stats.decoded_bytes += part.size();
            row += rows;
            out += part.size();
        }
    }
    stats.cpu_seconds += thread_seconds() - started;
    return true;
}

// Reads unfiltered whole rows that start at byte `offset`.
void ChunkReader::read_rows(const ChunkLocation& location, const File& file, std::uint64_t offset,
                            DecodeState& state) const {
    const Dataset& dataset = datasets_[location.dataset];
    const std::uint64_t row_bytes = dataset.row_bytes;
    const std::span<const RowDestination> rows = state.rows;
    const auto count_bytes = [&](std::uint64_t bytes) {
        state.stats.stored_bytes += bytes;
        state.stats.decoded_bytes += bytes;
    };
    std::size_t runs = 0;
    for (std::size_t i = 0; i < rows.size(); i += consecutive_rows(rows.subspan(i), row_bytes)) ++runs;
    if (rows.size() * row_bytes / runs >= kMinDirectRead) {
        for (std::size_t i = 0; i < rows.size();) {
            const std::size_t n = consecutive_rows(rows.subspan(i), row_bytes);
            file.read({rows[i].out, n * row_bytes}, offset + rows[i].row * row_bytes);
            count_bytes(n * row_bytes);
            i += n;
        }
    } else {
        const std::uint64_t first = rows.front().row, span = rows.back().row + 1 - first;
        const auto all = state.stored.reserve(span * row_bytes);
        file.read(all, offset + first * row_bytes);
        count_bytes(all.size());
        for (const auto& [row, out] : rows) std::memcpy(out, all.data() + (row - first) * row_bytes, row_bytes);
    }
    if (shard(location).byte_swapped)
        for (const auto& target : rows) swap_bytes({target.out, row_bytes}, dataset.item_size);
}

// Decodes a chunk and copies its rows; a chunk without a file consists of fill values.
void ChunkReader::read_chunk(const ChunkLocation& location, const File* file, DecodeState& state) const {
    const Dataset& dataset = datasets_[location.dataset];
    const Shard& shard = this->shard(location);
    const std::uint64_t chunk_bytes = dataset.chunk_bytes(shard);
    // A chunk of whole rows that are consecutive in the batch (sequential reading) is decoded directly into the batch.
    std::span<std::byte> destination;
    if (shard.chunk_shape == dataset.row_shape && state.rows.size() == shard.chunk_rows &&
        consecutive_rows(state.rows, dataset.row_bytes) == shard.chunk_rows)
        destination = {state.rows.front().out, chunk_bytes};
    std::span<std::byte> data;
    if (file == nullptr) {
        data = state.stored.reserve(chunk_bytes);
        for (std::size_t i = 0; i < data.size(); i += shard.fill.size())
            std::memcpy(data.data() + i, shard.fill.data(), shard.fill.size());
    } else {
        const std::size_t chunk = location.chunk_row * shard.grid_columns + location.column;
        const std::uint64_t size = shard.sizes[chunk];
        // The size comes from the file: check it before allocating.
        if (size > max_stored_size(chunk_bytes, shard.filters))
            throw DecodeError(std::to_string(size) + " stored bytes are too many for a chunk of " +
                              std::to_string(chunk_bytes));
        const auto stored = state.stored.reserve(size);
        file->read(stored, shard.offsets[chunk]);
        data = state.decoder.decode(stored, shard.masks[chunk], shard.filters, chunk_bytes, verify_checksums_,
                                    destination);
        if (shard.byte_swapped) swap_bytes(data, dataset.item_size);
        state.stats.stored_bytes += size;
    }
    state.stats.decoded_bytes += chunk_bytes;
    if (!destination.empty() && data.data() == destination.data()) return;
    const RowCopy copy(dataset, shard, dataset.chunk_origin(shard, location.chunk_row, location.column));
    for (const auto& [row, out] : state.rows) copy(data.data(), row, out);
}

std::string ChunkReader::describe(const ChunkLocation& location) const {
    const Dataset& dataset = datasets_[location.dataset];
    const Shard& shard = this->shard(location);
    const std::uint64_t chunk_start = location.chunk_row * shard.chunk_rows;
    const std::uint64_t first = shard.preceding + chunk_start + location.skipped;
    const std::string rows = "rows " + std::to_string(first) + ".." + std::to_string(first + location.rows - 1);
    std::string text = files_.info(shard.file).label + ": " + dataset.name + ": ";
    std::uint64_t offset = shard.offset + chunk_start * dataset.row_bytes;
    if (shard.contiguous) {
        text += rows;
    } else {
        text += "chunk [";
        std::vector<std::uint64_t> origin = dataset.chunk_origin(shard, location.chunk_row, location.column);
        origin[0] += shard.preceding;
        for (const std::uint64_t start : origin) text += std::to_string(start) + ", ";
        text.resize(text.size() - 2);
        text += "] (" + rows + ")";
        offset = shard.offsets[location.chunk_row * shard.grid_columns + location.column];
    }
    return offset == kUnwrittenChunk ? text : text + " at byte " + std::to_string(offset);
}

}  // namespace spinlock_fast
