// Reads and decodes one chunk and copies its requested rows to memory: one task of a reader thread.
#pragma once

#include "chunk_decoder.hpp"
#include "dataset_layout.hpp"
#include "errors.hpp"
#include "file.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace spinlock_fast {

// A chunk, or the rows of contiguous data that one task reads.
struct ChunkLocation {
    std::size_t dataset = 0, shard = 0;
    std::uint64_t chunk_row = 0, column = 0;  // in the grid of the shard
    std::uint64_t first_row = 0, rows = 0;    // row numbers over all shards, clipped to the shard
    std::uint64_t skipped = 0;                // rows of the chunk before first_row
};

// A row of a chunk and the memory of the full row.
struct RowDestination {
    std::uint64_t row;  // in the chunk
    std::byte* out;
};

struct ReaderStats {
    std::uint64_t chunks = 0;         // chunks read; contiguous data: read tasks
    std::uint64_t stored_bytes = 0;   // bytes read from files
    std::uint64_t decoded_bytes = 0;  // bytes of whole decoded chunks
    double cpu_seconds = 0.0;         // over all threads
};

// Memory and statistics of one thread, reused for each task.
struct DecodeState {
    std::vector<RowDestination> rows;  // sorted by row
    ChunkDecoder decoder;
    Scratch stored;
    ReaderStats stats;
};

class ChunkReader {
public:
    // Throws std::invalid_argument; see `Dataset::validate`.
    ChunkReader(std::vector<FileInfo> files, std::vector<Dataset> datasets, bool verify_checksums);

    const std::vector<Dataset>& datasets() const noexcept { return datasets_; }

    // The chunk in column 0 that holds a row; the row must exist.
    ChunkLocation chunk_of(std::size_t dataset, std::uint64_t row) const;

    std::uint64_t grid_columns(const ChunkLocation& location) const { return shard(location).grid_columns; }

    // Whether the caller reads the rows.
    bool read_by_caller(const ChunkLocation& location) const { return shard(location).read_by_caller; }

    // Fills the destinations in `state.rows`. Throws ReadError, DecodeError or std::bad_alloc; the caller adds the
    // position to the message.
    void read(const ChunkLocation& location, DecodeState& state);

    // Reads consecutive rows of all datasets, memory[d] for dataset d, if all of them are contiguous in their files and
    // in the page cache. Otherwise returns false, with memory partly overwritten; also if the files cannot be read, so
    // that `read` reports the reason.
    bool read_cached(std::uint64_t first_row, std::uint64_t count, std::span<const std::span<std::byte>> memory,
                     ReaderStats& stats);

    // "file: dataset: chunk [8, 0] (rows 8..15) at byte 4096"; rows are numbered within the file.
    std::string describe(const ChunkLocation& location) const;

private:
    const Shard& shard(const ChunkLocation& location) const {
        return datasets_[location.dataset].shards[location.shard];
    }
    void read_rows(const ChunkLocation& location, const File& file, std::uint64_t offset, DecodeState& state) const;
    void read_chunk(const ChunkLocation& location, const File* file, DecodeState& state) const;

    FileCache files_;
    std::vector<Dataset> datasets_;
    bool verify_checksums_;
};

}  // namespace spinlock_fast
