#include "row_reader.hpp"

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <map>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>

#include <unistd.h>

namespace spinlock_fast {
namespace {

struct Failure {
    std::uint64_t task;  // the failure of the lowest task number is reported, independent of timing
    std::string message;
};

struct Batch {
    std::uint64_t first, count;
    std::vector<std::span<std::byte>> memory;
    std::uint64_t submitted = 0;  // number of positions
    std::uint64_t pending = 0;    // row parts not yet copied
    std::optional<Failure> failure;
};

// The rows of one call of `submit`, shared by its tasks.
struct Submission {
    struct RowSlot {
        std::uint64_t row;
        std::uint32_t batch, slot;
    };
    std::vector<std::shared_ptr<Batch>> batches;
    std::vector<RowSlot> slots;  // sorted by row
};

struct Task {
    std::uint64_t number;
    std::shared_ptr<const Submission> submission;
    std::size_t begin, end;  // range of submission->slots
    ChunkLocation chunk;
};

// Blocks all signals in its scope. Threads started meanwhile inherit the mask, so that signals reach the main thread.
class BlockedSignals {
public:
    BlockedSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    BlockedSignals(const BlockedSignals&) = delete;
    BlockedSignals& operator=(const BlockedSignals&) = delete;

private:
    sigset_t before_;
};

}  // namespace

class RowReader::Pool {
public:
    Pool(std::vector<FileInfo> files, std::vector<Dataset> datasets, Options options)
        : chunk_reader_(std::move(files), std::move(datasets), options.verify_checksums),
          thread_count_(options.threads) {}

    ~Pool() {
        {
            const std::scoped_lock lock(mutex_);
            stopping_ = true;
        }
        task_queued_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    bool in_forked_process() const noexcept { return ::getpid() != owner_pid_; }

    void add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory);
    void submit(std::uint64_t first, std::span<const std::uint64_t> rows);
    bool wait(std::uint64_t first, std::chrono::milliseconds timeout);
    bool read_cached(std::uint64_t first_row, std::uint64_t count, std::span<const std::span<std::byte>> memory);
    ReaderStats stats() const;

private:
    void check_memory(std::uint64_t count, std::span<const std::span<std::byte>> memory) const;
    std::shared_ptr<const Submission> assign_slots(std::uint64_t first, std::span<const std::uint64_t> rows);
    std::vector<Task> make_tasks(const std::shared_ptr<const Submission>& submission) const;
    void start_threads();
    void worker_loop();
    std::optional<Failure> run_task(const Task& task, DecodeState& state);
    void complete_task(const Task& task, std::optional<Failure> failure, const ReaderStats& before,
                       const ReaderStats& now);

    ChunkReader chunk_reader_;
    const unsigned thread_count_;
    const ::pid_t owner_pid_ = ::getpid();

    mutable std::mutex mutex_;  // guards all members below
    std::condition_variable task_queued_, batch_done_;
    std::map<std::uint64_t, std::shared_ptr<Batch>> batches_;  // key: first position
    std::deque<Task> tasks_;
    std::uint64_t next_task_ = 0;
    ReaderStats stats_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

void RowReader::Pool::check_memory(std::uint64_t count, std::span<const std::span<std::byte>> memory) const {
    const auto& datasets = chunk_reader_.datasets();
    if (count == 0 || count > std::numeric_limits<std::uint32_t>::max())
        throw std::invalid_argument("count: " + std::to_string(count) + ", expected 1..2^32 - 1 rows");
    if (memory.size() != datasets.size()) throw std::invalid_argument("one block of memory per dataset is needed");
    for (std::size_t d = 0; d < datasets.size(); ++d)
        if (memory[d].size() / datasets[d].row_bytes < count)
            throw std::invalid_argument(datasets[d].name + ": the memory is too small for the batch");
}

void RowReader::Pool::add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory) {
    check_memory(count, memory);
    const std::scoped_lock lock(mutex_);
    if (!batches_.empty()) {
        const Batch& last = *batches_.rbegin()->second;
        if (first < last.first + last.count) throw std::invalid_argument("batches overlap");
    }
    batches_[first] = std::make_shared<Batch>(Batch{first, count, std::move(memory), 0, 0, std::nullopt});
}

// Finds batch and slot of every position. Requires the lock.
std::shared_ptr<const Submission> RowReader::Pool::assign_slots(std::uint64_t first,
                                                                std::span<const std::uint64_t> rows) {
    auto submission = std::make_shared<Submission>();
    auto batch = batches_.upper_bound(first);
    if (batch == batches_.begin()) throw std::invalid_argument("no batch covers the rows");
    --batch;
    submission->slots.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const std::uint64_t position = first + i;
        for (const auto& dataset : chunk_reader_.datasets())
            if (rows[i] >= dataset.rows())
                throw std::invalid_argument("row " + std::to_string(rows[i]) + " is out of range");
        while (batch != batches_.end() && position >= batch->second->first + batch->second->count) ++batch;
        if (batch == batches_.end() || position < batch->second->first)
            throw std::invalid_argument("no batch covers the rows");
        if (submission->batches.empty() || submission->batches.back() != batch->second)
            submission->batches.push_back(batch->second);
        submission->slots.push_back({rows[i], static_cast<std::uint32_t>(submission->batches.size() - 1),
                                     static_cast<std::uint32_t>(position - batch->second->first)});
    }
    const auto key = [](const Submission::RowSlot& slot) { return std::tuple(slot.row, slot.batch, slot.slot); };
    if (!std::ranges::is_sorted(submission->slots, {}, key)) std::ranges::sort(submission->slots, {}, key);
    return submission;
}

// One task for each chunk that holds rows of the submission.
std::vector<Task> RowReader::Pool::make_tasks(const std::shared_ptr<const Submission>& submission) const {
    std::vector<Task> tasks;
    const auto& slots = submission->slots;
    for (std::size_t d = 0; d < chunk_reader_.datasets().size(); ++d) {
        for (std::size_t begin = 0; begin < slots.size();) {
            const ChunkLocation chunk = chunk_reader_.chunk_of(d, slots[begin].row);
            std::size_t end = begin + 1;
            while (end < slots.size() && slots[end].row < chunk.first_row + chunk.rows) ++end;
            const std::uint64_t columns = chunk_reader_.read_by_caller(chunk) ? 0 : chunk_reader_.grid_columns(chunk);
            for (std::uint64_t column = 0; column < columns; ++column) {
                tasks.push_back({0, submission, begin, end, chunk});
                tasks.back().chunk.column = column;
            }
            begin = end;
        }
    }
    return tasks;
}

void RowReader::Pool::submit(std::uint64_t first, std::span<const std::uint64_t> rows) {
    {
        const std::scoped_lock lock(mutex_);
        const auto submission = assign_slots(first, rows);
        std::vector<Task> tasks = make_tasks(submission);
        if (!tasks.empty()) start_threads();  // may throw: nothing must be queued before
        for (const auto& slot : submission->slots) ++submission->batches[slot.batch]->submitted;
        for (Task& task : tasks) {
            task.number = next_task_++;
            for (std::size_t i = task.begin; i < task.end; ++i)
                ++submission->batches[submission->slots[i].batch]->pending;
            tasks_.push_back(std::move(task));
        }
    }
    task_queued_.notify_all();
}

void RowReader::Pool::start_threads() {
    const BlockedSignals blocked;
    while (threads_.size() < thread_count_) {
        try {
            threads_.emplace_back([this] { worker_loop(); });
        } catch (const std::system_error&) {
            if (threads_.empty()) throw;
            return;  // continue with fewer threads
        }
    }
}

void RowReader::Pool::worker_loop() {
    DecodeState state;
    for (;;) {
        std::optional<Task> task;
        {
            std::unique_lock lock(mutex_);
            task_queued_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
            if (stopping_) return;
            task = std::move(tasks_.front());
            tasks_.pop_front();
        }
        const ReaderStats before = state.stats;
        std::optional<Failure> failure = run_task(*task, state);
        complete_task(*task, std::move(failure), before, state.stats);
    }
}

std::optional<Failure> RowReader::Pool::run_task(const Task& task, DecodeState& state) {
    const Submission& submission = *task.submission;
    const std::uint64_t row_bytes = chunk_reader_.datasets()[task.chunk.dataset].row_bytes;
    try {
        state.rows.clear();
        for (std::size_t i = task.begin; i < task.end; ++i) {
            const auto& [row, batch, slot] = submission.slots[i];
            const auto memory = submission.batches[batch]->memory[task.chunk.dataset];
            state.rows.push_back({row - task.chunk.first_row + task.chunk.skipped, memory.data() + slot * row_bytes});
        }
        chunk_reader_.read(task.chunk, state);
        return std::nullopt;
    } catch (const DecodeError& error) {
        return Failure{task.number, chunk_reader_.describe(task.chunk) + " is damaged: " + error.what()};
    } catch (const UnsupportedError& error) {
        return Failure{task.number,
                       chunk_reader_.describe(task.chunk) + ": the native reader does not support " + error.what()};
    } catch (const std::exception& error) {
        // Includes std::bad_alloc: an exception must not leave a thread.
        return Failure{task.number, chunk_reader_.describe(task.chunk) + ": " + error.what()};
    }
}

void RowReader::Pool::complete_task(const Task& task, std::optional<Failure> failure, const ReaderStats& before,
                                    const ReaderStats& now) {
    bool batch_complete = false;
    {
        const std::scoped_lock lock(mutex_);
        stats_.chunks += now.chunks - before.chunks;
        stats_.stored_bytes += now.stored_bytes - before.stored_bytes;
        stats_.decoded_bytes += now.decoded_bytes - before.decoded_bytes;
        stats_.cpu_seconds += now.cpu_seconds - before.cpu_seconds;
        for (std::size_t i = task.begin; i < task.end; ++i) {
            Batch& batch = *task.submission->batches[task.submission->slots[i].batch];
            batch_complete |= --batch.pending == 0;
            if (failure && (!batch.failure || failure->task < batch.failure->task)) batch.failure = failure;
        }
    }
    if (batch_complete) batch_done_.notify_all();
}

bool RowReader::Pool::wait(std::uint64_t first, std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    const auto entry = batches_.find(first);
    if (entry == batches_.end()) throw std::logic_error("no batch starts at " + std::to_string(first));
    const std::shared_ptr<Batch> batch = entry->second;
    if (batch->submitted != batch->count) throw std::logic_error("positions of the batch were not submitted");
    // Wait for all tasks even after a failure: the message then does not depend on timing, and no thread still writes
    // to the memory of the batch.
    if (!batch_done_.wait_for(lock, timeout, [&] { return batch->pending == 0; })) return false;
    batches_.erase(first);
    if (batch->failure) throw ReadError(batch->failure->message);
    return true;
}

bool RowReader::Pool::read_cached(std::uint64_t first_row, std::uint64_t count,
                                  std::span<const std::span<std::byte>> memory) {
    check_memory(count, memory);
    for (const auto& dataset : chunk_reader_.datasets())
        if (count > dataset.rows() || first_row > dataset.rows() - count)
            throw std::invalid_argument("row " + std::to_string(first_row + count - 1) + " is out of range");
    ReaderStats read;
    if (!chunk_reader_.read_cached(first_row, count, memory, read)) return false;
    const std::scoped_lock lock(mutex_);
    stats_.chunks += read.chunks;
    stats_.stored_bytes += read.stored_bytes;
    stats_.decoded_bytes += read.decoded_bytes;
    stats_.cpu_seconds += read.cpu_seconds;
    return true;
}

ReaderStats RowReader::Pool::stats() const {
    const std::scoped_lock lock(mutex_);
    return stats_;
}

RowReader::RowReader(std::vector<FileInfo> files, std::vector<Dataset> datasets, Options options)
    : pool_(std::make_unique<Pool>(std::move(files), std::move(datasets), options)) {}

RowReader::~RowReader() {
    // In a forked process the copied mutex may be locked by a thread that does not exist: leak the pool.
    if (pool_ && pool_->in_forked_process()) static_cast<void>(pool_.release());
}

RowReader::Pool& RowReader::pool() const {
    if (pool_->in_forked_process()) throw std::logic_error("a RowReader cannot be used in a forked process");
    return *pool_;
}

void RowReader::add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory) {
    pool().add_batch(first, count, std::move(memory));
}

void RowReader::submit(std::uint64_t first, std::span<const std::uint64_t> rows) { pool().submit(first, rows); }

bool RowReader::wait(std::uint64_t first, std::chrono::milliseconds timeout) { return pool().wait(first, timeout); }

bool RowReader::read_cached(std::uint64_t first_row, std::uint64_t count,
                            std::span<const std::span<std::byte>> memory) {
    return pool().read_cached(first_row, count, memory);
}

ReaderStats RowReader::stats() const { return pool_->in_forked_process() ? ReaderStats{} : pool_->stats(); }

}  // namespace spinlock_fast
