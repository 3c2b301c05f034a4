// Threads that read and decode chunks and copy their rows to positions in batches.
#pragma once

#include "chunk_reader.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace spinlock_fast {

// Rows are numbered over all shards. A position is a place in the caller's order of rows, and a batch is a range of
// positions with memory. The caller adds batches, submits the row numbers of ranges of positions, and waits for
// batches. Each chunk is decoded once per submission. Only `wait` blocks. `read_cached` needs no batch. In a forked
// process, which has no copy of the threads, every call throws std::logic_error, except `stats`, which returns zeros.
class RowReader {
public:
    struct Options {
        unsigned threads = 1;
        bool verify_checksums = true;
    };

    // Throws std::invalid_argument if the layout of a dataset is inconsistent. Threads start with the first `submit`.
    RowReader(std::vector<FileInfo> files, std::vector<Dataset> datasets, Options options);

    // Discards queued tasks and joins the threads. Does nothing in a forked process.
    ~RowReader();

    // Adds a batch of positions [first, first + count), after those of all earlier batches.
    // memory: `count` rows for each dataset; must stay valid until the batch is complete or the reader is destroyed.
    void add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory);

    // Queues reading of rows[i] to position first + i; batches must cover all positions.
    void submit(std::uint64_t first, std::span<const std::uint64_t> rows);

    // Returns whether the batch that starts at `first` is complete within `timeout`; a complete or failed batch is
    // removed. Throws ReadError if one of its rows cannot be read, std::logic_error if the batch was not added or not
    // all of its positions were submitted.
    bool wait(std::uint64_t first, std::chrono::milliseconds timeout);

    // Reads rows [first_row, first_row + count) in the calling thread, without waiting for the disk. Returns false, with
    // memory partly overwritten, unless all datasets store them contiguously and they are in the page cache.
    bool read_cached(std::uint64_t first_row, std::uint64_t count, std::span<const std::span<std::byte>> memory);

    ReaderStats stats() const;

private:
    class Pool;
    Pool& pool() const;
    std::unique_ptr<Pool> pool_;
};

}  // namespace spinlock_fast
