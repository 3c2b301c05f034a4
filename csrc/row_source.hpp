// Rows of one chunk, from the file to their places in memory; what a thread of the reader does for one task.
#pragma once

#include "chunk_decoder.hpp"
#include "dataset.hpp"
#include "errors.hpp"
#include "file.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace spinlock_fast {

// A chunk, or as much of contiguous data as is read at once.
struct ChunkPlace {
    std::size_t dataset = 0, shard = 0;
    std::uint64_t chunk_row = 0, column = 0;  // in the grid of the shard
    std::uint64_t first_row = 0, rows = 0;    // over all shards; what overhangs the shard is not counted
};

// A row of a chunk and the memory of the whole row.
struct RowTarget {
    std::uint64_t row;  // in the chunk
    std::byte* out;
};

struct ReaderStats {
    std::uint64_t chunks = 0;         // read; contiguous data count by task
    std::uint64_t stored_bytes = 0;   // read from files
    std::uint64_t decoded_bytes = 0;  // after decoding, whole chunks
    double cpu_seconds = 0.0;         // of all threads
};

// What a thread keeps from task to task.
struct Decoding {
    std::vector<RowTarget> rows;  // by row
    ChunkDecoder decoder;
    Scratch stored;
    ReaderStats stats;
};

class RowSource {
public:
    // Throws std::invalid_argument, see Dataset::validate.
    RowSource(std::vector<FileName> files, std::vector<Dataset> datasets, bool verify_checksums);

    const std::vector<Dataset>& datasets() const noexcept { return datasets_; }

    // The chunk (its first column) that holds a row; the row must exist.
    ChunkPlace chunk_of(std::size_t dataset, std::uint64_t row) const;

    std::uint64_t columns(const ChunkPlace& place) const { return shard(place).columns; }

    // Fills `decoding.rows`. Throws ReadError, DecodeError or std::bad_alloc without saying where.
    void read(const ChunkPlace& place, Decoding& decoding);

    // "file: dataset: chunk [8, 0] (rows 8..15) at byte 4096", rows as numbered in the file.
    std::string describe(const ChunkPlace& place) const;

private:
    const Shard& shard(const ChunkPlace& place) const { return datasets_[place.dataset].shards[place.shard]; }
    void read_rows(const ChunkPlace& place, const File& file, std::uint64_t offset, Decoding& decoding) const;
    void read_chunk(const ChunkPlace& place, const File* file, Decoding& decoding) const;

    FileCache files_;
    std::vector<Dataset> datasets_;
    bool verify_checksums_;
};

}  // namespace spinlock_fast
