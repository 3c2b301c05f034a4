// Threads that fill batches of rows: read, decode, and copy every row to the place that the caller chose for it.
#pragma once

#include "row_source.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace spinlock_fast {

// Rows are numbered over all shards; positions are the order in which the caller wants them. A batch is a range
// of positions with memory for it. The caller adds batches, submits runs of positions (which rows lie there), and
// waits for batches. A chunk is decoded once per run. No call but `wait` blocks. In a process that was forked off,
// where the threads do not exist, every call throws std::logic_error, but for `stats`, which are empty.
class RowReader {
public:
    struct Options {
        unsigned threads = 1;
        bool verify_checksums = true;
    };

    // Throws std::invalid_argument where the description of a dataset contradicts itself. Starts no thread.
    RowReader(std::vector<FileName> files, std::vector<Dataset> datasets, Options options);

    // Drops what is not begun and joins the threads. In a process that was forked off, where the threads do not
    // exist, it leaves everything as it is.
    ~RowReader();

    // A batch of positions [first, first + count), not before those of the batch added last. memory: for every
    // dataset `count` rows, which must live until the batch is complete or the reader is destroyed.
    void add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory);

    // Rows of the positions from `first` on, which batches must cover; begins reading.
    void submit(std::uint64_t first, std::span<const std::uint64_t> rows);

    // Whether the batch that starts at `first` became complete within `most`. Throws ReadError where a row of it
    // cannot be read, std::logic_error where it was not added or not wholly submitted. A batch that is complete or
    // has failed is forgotten.
    bool wait(std::uint64_t first, std::chrono::milliseconds most);

    ReaderStats stats() const;

private:
    class Pool;
    Pool& pool() const;
    std::unique_ptr<Pool> pool_;
};

}  // namespace spinlock_fast
