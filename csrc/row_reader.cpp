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
    std::uint64_t task;  // of several, the earliest counts, whichever thread was first
    std::string message;
};

struct Batch {
    std::uint64_t first, count;
    std::vector<std::span<std::byte>> memory;
    std::uint64_t submitted = 0;  // positions
    std::uint64_t pending = 0;    // pieces of rows that are still to come
    std::optional<Failure> failure;
};

// What one call of `submit` asked for, shared by its tasks.
struct Run {
    struct Place {
        std::uint64_t row;
        std::uint32_t batch, slot;
    };
    std::vector<std::shared_ptr<Batch>> batches;
    std::vector<Place> places;  // by row
};

struct Task {
    std::uint64_t number;
    std::shared_ptr<const Run> run;
    std::size_t begin, end;  // of run->places
    ChunkPlace chunk;
};

// Signals are for the thread that called, which knows what to do about them.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

private:
    sigset_t before_;
};

}  // namespace

class RowReader::Pool {
public:
    Pool(std::vector<FileName> files, std::vector<Dataset> datasets, Options options)
        : source_(std::move(files), std::move(datasets), options.verify_checksums), threads_wanted_(options.threads) {}

    ~Pool() {
        {
            const std::scoped_lock lock(mutex_);
            stop_ = true;
        }
        work_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    bool forked() const noexcept { return ::getpid() != process_; }

    void add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory);
    void submit(std::uint64_t first, std::span<const std::uint64_t> rows);
    bool wait(std::uint64_t first, std::chrono::milliseconds most);
    ReaderStats stats() const;

private:
    std::shared_ptr<const Run> place(std::uint64_t first, std::span<const std::uint64_t> rows);
    std::vector<Task> cut(const std::shared_ptr<const Run>& run) const;
    void start_threads();
    void work();
    std::optional<Failure> perform(const Task& task, Decoding& decoding);
    void finish(const Task& task, std::optional<Failure> failure, const ReaderStats& before, const ReaderStats& now);

    RowSource source_;
    const unsigned threads_wanted_;
    const ::pid_t process_ = ::getpid();

    mutable std::mutex mutex_;  // of all below
    std::condition_variable work_, done_;
    std::map<std::uint64_t, std::shared_ptr<Batch>> batches_;  // by first position
    std::deque<Task> tasks_;
    std::uint64_t next_task_ = 0;
    ReaderStats stats_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

void RowReader::Pool::add_batch(std::uint64_t first, std::uint64_t count,
                                std::vector<std::span<std::byte>> memory) {
    const auto& datasets = source_.datasets();
    if (count == 0 || count > std::numeric_limits<std::uint32_t>::max())
        throw std::invalid_argument("a batch of " + std::to_string(count) + " rows");
    if (memory.size() != datasets.size()) throw std::invalid_argument("memory for another number of datasets");
    for (std::size_t d = 0; d < datasets.size(); ++d)
        if (memory[d].size() / datasets[d].row_bytes < count)
            throw std::invalid_argument(datasets[d].name + ": the memory is too small for the batch");
    const std::scoped_lock lock(mutex_);
    if (!batches_.empty()) {
        const Batch& last = *batches_.rbegin()->second;
        if (first < last.first + last.count) throw std::invalid_argument("batches overlap");
    }
    batches_[first] = std::make_shared<Batch>(Batch{first, count, std::move(memory), 0, 0, std::nullopt});
}

// Finds batch and slot of every position; called with the lock held.
std::shared_ptr<const Run> RowReader::Pool::place(std::uint64_t first, std::span<const std::uint64_t> rows) {
    auto run = std::make_shared<Run>();
    auto batch = batches_.upper_bound(first);
    if (batch == batches_.begin()) throw std::invalid_argument("no batch covers the rows");
    --batch;
    run->places.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const std::uint64_t position = first + i;
        for (const auto& dataset : source_.datasets())
            if (rows[i] >= dataset.rows()) throw std::invalid_argument("no row " + std::to_string(rows[i]));
        while (batch != batches_.end() && position >= batch->second->first + batch->second->count) ++batch;
        if (batch == batches_.end() || position < batch->second->first)
            throw std::invalid_argument("no batch covers the rows");
        if (run->batches.empty() || run->batches.back() != batch->second) run->batches.push_back(batch->second);
        run->places.push_back({rows[i], static_cast<std::uint32_t>(run->batches.size() - 1),
                               static_cast<std::uint32_t>(position - batch->second->first)});
    }
    std::ranges::sort(run->places, {}, [](const Run::Place& p) { return std::tuple(p.row, p.batch, p.slot); });
    return run;
}

// One task for every chunk that holds rows of the run.
std::vector<Task> RowReader::Pool::cut(const std::shared_ptr<const Run>& run) const {
    std::vector<Task> tasks;
    const auto& places = run->places;
    for (std::size_t d = 0; d < source_.datasets().size(); ++d) {
        for (std::size_t begin = 0; begin < places.size();) {
            const ChunkPlace chunk = source_.chunk_of(d, places[begin].row);
            std::size_t end = begin + 1;
            while (end < places.size() && places[end].row < chunk.first_row + chunk.rows) ++end;
            for (std::uint64_t column = 0; column < source_.columns(chunk); ++column) {
                tasks.push_back({0, run, begin, end, chunk});
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
        const auto run = place(first, rows);
        std::vector<Task> tasks = cut(run);
        if (!tasks.empty()) start_threads();  // before anything is queued: a queue without threads would never end
        for (const auto& p : run->places) ++run->batches[p.batch]->submitted;
        for (Task& task : tasks) {
            task.number = next_task_++;
            for (std::size_t i = task.begin; i < task.end; ++i) ++run->batches[run->places[i].batch]->pending;
            tasks_.push_back(std::move(task));
        }
    }
    work_.notify_all();
}

void RowReader::Pool::start_threads() {
    const SignalsBlocked blocked;
    while (threads_.size() < threads_wanted_) {
        try {
            threads_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            if (threads_.empty()) throw;
            return;  // fewer threads read the same rows
        }
    }
}

void RowReader::Pool::work() {
    Decoding decoding;
    for (;;) {
        std::optional<Task> task;
        {
            std::unique_lock lock(mutex_);
            work_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
            if (stop_) return;
            task = std::move(tasks_.front());
            tasks_.pop_front();
        }
        const ReaderStats before = decoding.stats;
        std::optional<Failure> failure = perform(*task, decoding);
        finish(*task, std::move(failure), before, decoding.stats);
    }
}

std::optional<Failure> RowReader::Pool::perform(const Task& task, Decoding& decoding) {
    const Run& run = *task.run;
    const std::uint64_t row_bytes = source_.datasets()[task.chunk.dataset].row_bytes;
    try {
        decoding.rows.clear();
        for (std::size_t i = task.begin; i < task.end; ++i) {
            const auto& [row, batch, slot] = run.places[i];
            const auto memory = run.batches[batch]->memory[task.chunk.dataset];
            decoding.rows.push_back({row - task.chunk.first_row, memory.data() + slot * row_bytes});
        }
        source_.read(task.chunk, decoding);
        return std::nullopt;
    } catch (const DecodeError& error) {
        return Failure{task.number, source_.describe(task.chunk) + " is damaged: " + error.what()};
    } catch (const std::exception& error) {
        // std::bad_alloc among them: no thread may end by an exception.
        return Failure{task.number, source_.describe(task.chunk) + ": " + error.what()};
    }
}

void RowReader::Pool::finish(const Task& task, std::optional<Failure> failure, const ReaderStats& before,
                             const ReaderStats& now) {
    {
        const std::scoped_lock lock(mutex_);
        stats_.chunks += now.chunks - before.chunks;
        stats_.stored_bytes += now.stored_bytes - before.stored_bytes;
        stats_.decoded_bytes += now.decoded_bytes - before.decoded_bytes;
        stats_.cpu_seconds += now.cpu_seconds - before.cpu_seconds;
        for (std::size_t i = task.begin; i < task.end; ++i) {
            Batch& batch = *task.run->batches[task.run->places[i].batch];
            --batch.pending;
            if (failure && (!batch.failure || failure->task < batch.failure->task)) batch.failure = failure;
        }
    }
    done_.notify_all();
}

bool RowReader::Pool::wait(std::uint64_t first, std::chrono::milliseconds most) {
    std::unique_lock lock(mutex_);
    const auto found = batches_.find(first);
    if (found == batches_.end()) throw std::logic_error("no batch starts at " + std::to_string(first));
    const std::shared_ptr<Batch> batch = found->second;
    if (batch->submitted != batch->count) throw std::logic_error("rows of the batch were never submitted");
    // Also after a failure all of the batch is awaited: then the message does not depend on timing, and no thread
    // writes to its memory any more.
    if (!done_.wait_for(lock, most, [&] { return batch->pending == 0; })) return false;
    batches_.erase(first);
    if (batch->failure) throw ReadError(batch->failure->message);
    return true;
}

ReaderStats RowReader::Pool::stats() const {
    const std::scoped_lock lock(mutex_);
    return stats_;
}

RowReader::RowReader(std::vector<FileName> files, std::vector<Dataset> datasets, Options options)
    : pool_(std::make_unique<Pool>(std::move(files), std::move(datasets), options)) {}

RowReader::~RowReader() {
    // The copy in a forked process may hold locks of threads that are not there: it must not be touched.
    if (pool_ && pool_->forked()) static_cast<void>(pool_.release());
}

RowReader::Pool& RowReader::pool() const {
    if (pool_->forked()) throw std::logic_error("the reader belongs to the process that this one was forked from");
    return *pool_;
}

void RowReader::add_batch(std::uint64_t first, std::uint64_t count, std::vector<std::span<std::byte>> memory) {
    pool().add_batch(first, count, std::move(memory));
}

void RowReader::submit(std::uint64_t first, std::span<const std::uint64_t> rows) { pool().submit(first, rows); }

bool RowReader::wait(std::uint64_t first, std::chrono::milliseconds most) { return pool().wait(first, most); }

ReaderStats RowReader::stats() const { return pool_->forked() ? ReaderStats{} : pool_->stats(); }

}  // namespace spinlock_fast
