// The threads of RowReader on real files; also run under the thread sanitizer.
#include "check.hpp"
#include "row_reader.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <thread>

#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

using namespace spinlock_fast;
using namespace spinlock_fast::testing;
using namespace std::chrono_literals;

#if defined(RWF_NOWAIT)
namespace {
enum class Reads { complete, interrupted, in_parts, not_cached } reads = Reads::complete;
int read_count = 0;
}  // namespace

// Replaces the function of the C library.
extern "C" ::ssize_t preadv2(int descriptor, const struct iovec* parts, int count, ::off_t offset, int flags) {
    ++read_count;
    CHECK(count == 1 && (flags & RWF_NOWAIT) != 0);
    if (reads == Reads::interrupted && read_count % 2 == 1) {
        errno = EINTR;
        return -1;
    }
    if (reads == Reads::not_cached && read_count > 3) {
        errno = EAGAIN;
        return -1;
    }
    const bool whole = reads == Reads::complete || reads == Reads::interrupted;
    return ::pread(descriptor, parts->iov_base, whole ? parts->iov_len : std::min<std::size_t>(parts->iov_len, 100), offset);
}
#endif

namespace {

constexpr std::uint64_t kRows = 1000, kChunkRows = 8, kWidth = 50;

// A temporary file, removed by the destructor.
class TemporaryFile {
public:
    explicit TemporaryFile(const Bytes& content) {
        std::string name = (std::filesystem::temp_directory_path() / "spinlock_fast_XXXXXX").string();
        const int descriptor = ::mkstemp(name.data());
        CHECK(descriptor >= 0);
        ::close(descriptor);
        path_ = name;
        write(content);
    }
    ~TemporaryFile() { std::filesystem::remove(path_); }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    void write(const Bytes& content) const {
        std::ofstream(path_, std::ios::binary)
            .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
    }

    FileInfo info() const {
        struct stat status{};
        CHECK(::stat(path_.c_str(), &status) == 0);
        return {.path = path_,
                .label = "file",
                .identity = {.device = static_cast<std::uint64_t>(status.st_dev),
                             .inode = static_cast<std::uint64_t>(status.st_ino),
                             .size = static_cast<std::uint64_t>(status.st_size),
                             .mtime_ns = status.st_mtim.tv_sec * 1'000'000'000LL + status.st_mtim.tv_nsec}};
    }

private:
    std::string path_;
};

// Row r holds r * width, r * width + 1, ...
std::vector<std::uint32_t> values() {
    std::vector<std::uint32_t> all(kRows * kWidth);
    std::iota(all.begin(), all.end(), 0U);
    return all;
}

Bytes bytes_of(const std::vector<std::uint32_t>& items) {
    const auto view = std::as_bytes(std::span(items));
    return {view.begin(), view.end()};
}

// The same data contiguous, and chunked with every filter that this build can decode.
struct Stored {
    Bytes file;
    std::vector<Dataset> datasets;
};

Stored store() {
    Stored stored{.file = bytes_of(values()), .datasets = {}};
    const Dataset plain{.name = "plain", .item_size = 4, .row_shape = {kWidth}, .shards = {}};
    stored.datasets = {plain, plain};
    stored.datasets[0].shards.push_back({.rows = kRows, .chunk_rows = 16, .contiguous = true});
    stored.datasets[1].name = "chunked";
    Shard chunked{.rows = kRows, .chunk_rows = kChunkRows, .chunk_shape = {kWidth}, .fill = Bytes(4)};
    chunked.filters = {{FilterKind::shuffle, 4}};
    const bool deflate = inflate_library() != "none";
    if (deflate) chunked.filters.push_back({FilterKind::deflate});
    for (std::uint64_t first = 0; first < kRows; first += kChunkRows) {
        auto items = values();
        items = {items.begin() + static_cast<std::ptrdiff_t>(first * kWidth),
                 items.begin() + static_cast<std::ptrdiff_t>((first + kChunkRows) * kWidth)};
        Bytes chunk = shuffled(bytes_of(items), 4);
        if (deflate) chunk = zlib_stored(chunk);
        chunked.offsets.push_back(stored.file.size());
        chunked.sizes.push_back(chunk.size());
        chunked.masks.push_back(0);
        stored.file.insert(stored.file.end(), chunk.begin(), chunk.end());
    }
    stored.datasets[1].shards.push_back(std::move(chunked));
    return stored;
}

// Batches of shuffled rows, submitted ahead and awaited one by one.
struct Batches {
    Batches(RowReader& reader, std::size_t datasets, std::uint64_t size) : size(size) {
        rows.resize(kRows);
        std::iota(rows.begin(), rows.end(), 0U);
        std::ranges::shuffle(rows, std::mt19937(5));
        for (std::uint64_t first = 0; first < kRows; first += size) {
            const std::uint64_t count = std::min(size, kRows - first);
            auto& parts = memory.emplace_back(datasets, std::vector<std::uint32_t>(count * kWidth, ~0U));
            std::vector<std::span<std::byte>> spans;
            for (auto& part : parts) spans.push_back(std::as_writable_bytes(std::span(part)));
            reader.add_batch(first, count, spans);
        }
        for (std::uint64_t first = 0; first < kRows; first += 300)
            reader.submit(first, std::span(rows).subspan(first, std::min<std::uint64_t>(300, kRows - first)));
    }

    bool right(std::size_t batch) const {
        for (const auto& part : memory[batch])
            for (std::size_t i = 0; i < part.size(); ++i)
                if (part[i] != rows[batch * size + i / kWidth] * kWidth + i % kWidth) return false;
        return true;
    }

    std::uint64_t size;
    std::vector<std::uint64_t> rows;
    std::vector<std::vector<std::vector<std::uint32_t>>> memory;
};

void wait(RowReader& reader, std::uint64_t first) {
    while (!reader.wait(first, 10ms)) {
    }
}

void batches_hold_the_submitted_rows() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    for (const unsigned threads : {1U, 4U}) {
        RowReader reader({file.info()}, stored.datasets, {.threads = threads});
        const Batches batches(reader, 2, 64);
        for (std::size_t b = 0; b < batches.memory.size(); ++b) {
            wait(reader, b * 64);
            CHECK(batches.right(b));
        }
        CHECK(reader.stats().chunks > 0);
        CHECK_THROWS(std::logic_error, "no batch starts", reader.wait(0, 1ms));
    }
}

// Rows 100..112 of the chunked dataset, 20 rows of the caller, then rows 3..8 of the contiguous one.
void segments_hold_ranges_of_rows() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    Dataset dataset{.name = "virtual", .item_size = 4, .row_shape = {kWidth}, .shards = {}};
    Shard chunked = stored.datasets[1].shards[0];
    chunked.rows = 13;
    chunked.skipped = 100 % kChunkRows;
    chunked.preceding = 100 / kChunkRows * kChunkRows;
    const std::size_t first = 100 / kChunkRows, last = 112 / kChunkRows;
    const auto part = [&](auto& table) {
        table = {table.begin() + static_cast<std::ptrdiff_t>(first), table.begin() + static_cast<std::ptrdiff_t>(last + 1)};
    };
    part(chunked.offsets);
    part(chunked.sizes);
    part(chunked.masks);
    dataset.shards.push_back(std::move(chunked));
    dataset.shards.push_back({.rows = 20, .read_by_caller = true});
    dataset.shards.push_back({.rows = 6, .chunk_rows = 4, .contiguous = true, .offset = 3 * kWidth * 4});
    RowReader reader({file.info()}, {dataset}, {.threads = 2});
    std::vector<std::uint32_t> memory(39 * kWidth, ~0U);
    reader.add_batch(0, 39, {std::as_writable_bytes(std::span(memory))});
    std::vector<std::uint64_t> rows(39);
    std::iota(rows.begin(), rows.end(), 0U);
    reader.submit(0, rows);
    wait(reader, 0);
    for (std::uint64_t row = 0; row < 39; ++row) {
        const std::uint64_t source = row < 13 ? 100 + row : row - 33 + 3;
        const std::uint32_t expected = row >= 13 && row < 33 ? ~0U : static_cast<std::uint32_t>(source * kWidth);
        CHECK(memory[row * kWidth] == expected);
    }
    dataset.shards[0].skipped = kChunkRows;
    CHECK_THROWS(std::invalid_argument, "more rows are skipped", RowReader({file.info()}, {dataset}, {.threads = 1}));
    dataset.shards = {{.rows = std::uint64_t{1} << 62, .read_by_caller = true}, {.rows = 1, .read_by_caller = true}};
    CHECK_THROWS(std::invalid_argument, "impossibly large", RowReader({file.info()}, {dataset}, {.threads = 1}));
}

#if defined(RWF_NOWAIT)
void cached_rows_are_read_without_threads() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    Dataset swapped = stored.datasets[0];  // rows 3..8 in the other byte order, an empty shard, rows 20..
    swapped.shards = {{.rows = 6, .byte_swapped = true, .contiguous = true, .offset = 3 * kWidth * 4},
                      {.rows = 0, .contiguous = true},
                      {.rows = kRows - 20, .contiguous = true, .offset = 20 * kWidth * 4}};
    RowReader reader({file.info()}, {stored.datasets[0], swapped}, {.threads = 1});
    std::vector<std::uint32_t> plain(9 * kWidth), other(9 * kWidth);
    const std::vector memory = {std::as_writable_bytes(std::span(plain)), std::as_writable_bytes(std::span(other))};
    for (const Reads kind : {Reads::complete, Reads::interrupted, Reads::in_parts}) {
        reads = kind;
        std::ranges::fill(plain, ~0U);
        std::ranges::fill(other, ~0U);
        read_count = 0;
        CHECK(reader.read_cached(2, 9, memory));
        CHECK(read_count == (kind == Reads::complete ? 3 : kind == Reads::interrupted ? 6 : 18 + 8 + 10));
        for (std::uint32_t i = 0; i < 9 * kWidth; ++i) {
            CHECK(plain[i] == 2 * kWidth + i);
            const std::uint32_t value = static_cast<std::uint32_t>(i < 4 * kWidth ? 5 * kWidth + i : 16 * kWidth + i);
            CHECK(other[i] == (i < 4 * kWidth ? __builtin_bswap32(value) : value));
        }
    }
    CHECK(reader.stats().chunks == 9);
    CHECK(reader.stats().stored_bytes == 3 * 2 * 9 * kWidth * 4);
    reads = Reads::not_cached;
    read_count = 0;
    CHECK(!reader.read_cached(2, 9, memory));
    CHECK(reader.stats().chunks == 9);
    reads = Reads::complete;
    CHECK_THROWS(std::invalid_argument, "out of range", reader.read_cached(kRows - 20, 7, memory));
    CHECK_THROWS(std::invalid_argument, "too small", reader.read_cached(0, 10, memory));
    CHECK_THROWS(std::invalid_argument, "count: 0", reader.read_cached(0, 0, memory));
    RowReader chunked({file.info()}, stored.datasets, {.threads = 1});
    CHECK(!chunked.read_cached(2, 9, memory));
    CHECK(reader.read_cached(2, 9, memory));
    file.write(Bytes(stored.file.begin(), stored.file.begin() + 1000));
    CHECK(!reader.read_cached(2, 9, memory));
    CHECK(!reader.read_cached(500, 9, memory));
    reader.add_batch(0, 9, memory);
    std::vector<std::uint64_t> rows(9);
    std::iota(rows.begin(), rows.end(), 2U);
    reader.submit(0, rows);
    CHECK_THROWS(ReadError, "file: plain: rows 0..15 at byte 0: the file has changed", wait(reader, 0));
}
#endif

void reader_can_be_destroyed_at_any_time() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    for (int i = 0; i < 20; ++i) {
        auto reader =
            std::make_unique<RowReader>(std::vector{file.info()}, stored.datasets, RowReader::Options{.threads = 3});
        const Batches batches(*reader, 2, 128);
        if (i % 2 == 0) wait(*reader, 0);
        std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
        reader.reset();  // before the memory to which its threads write
    }
}

void errors_are_reported_for_their_batches() {
    Stored stored = store();
    const Shard& chunked = stored.datasets[1].shards[0];
    stored.file[chunked.offsets[9] + 3] ^= std::byte{0xff};
    // Without deflate the damage is not detectable: use a wrong size instead.
    if (inflate_library() == "none") stored.datasets[1].shards[0].sizes[9] -= 1;
    const TemporaryFile file(stored.file);
    RowReader reader({file.info()}, stored.datasets, {.threads = 4});
    const Batches batches(reader, 2, 10);
    for (std::size_t b = 0; b < batches.memory.size(); ++b) {
        const auto first = batches.rows.begin() + static_cast<std::ptrdiff_t>(b * 10);
        const bool hit = std::any_of(first, first + 10, [](std::uint64_t row) { return row / kChunkRows == 9; });
        if (hit) {
            CHECK_THROWS(ReadError, "file: chunked: chunk [72, 0] (rows 72..79) at byte", wait(reader, b * 10));
        } else {
            wait(reader, b * 10);
            CHECK(batches.right(b));
        }
    }
}

void changed_files_are_rejected() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    const FileInfo before = file.info();
    file.write(Bytes(stored.file.begin(), stored.file.end() - 1));
    RowReader reader({before}, stored.datasets, {.threads = 2});
    const Batches batches(reader, 2, 500);
    CHECK_THROWS(ReadError, "has changed", wait(reader, 0));
    FileInfo missing = before;
    missing.path += ".not";
    RowReader other({missing}, stored.datasets, {.threads = 2});
    const Batches more(other, 2, 500);
    CHECK_THROWS(ReadError, "No such file", wait(other, 0));
}

void invalid_chunk_positions_are_errors() {
    Stored stored = store();
    Shard& chunked = stored.datasets[1].shards[0];
    chunked.sizes[0] = std::uint64_t{1} << 39;
    chunked.offsets[1] = stored.file.size() - 1;
    chunked.offsets[2] = ~std::uint64_t{0} - 5;
    chunked.sizes[3] = 0;
    const TemporaryFile file(stored.file);
    RowReader reader({file.info()}, {stored.datasets[1]}, {.threads = 2});
    std::vector<std::byte> memory(8 * kWidth * 4);
    for (std::uint64_t chunk = 0; chunk < 4; ++chunk) {
        std::vector<std::uint64_t> rows(8);
        std::iota(rows.begin(), rows.end(), chunk * 8);
        reader.add_batch(chunk * 8, 8, {memory});
        reader.submit(chunk * 8, rows);
        const char* expected[] = {"too many for a chunk", "beyond the end", "beyond the end", "is damaged"};
        CHECK_THROWS(ReadError, expected[chunk], wait(reader, chunk * 8));
    }
}

void invalid_calls_are_rejected() {
    const Stored stored = store();
    const TemporaryFile file(stored.file);
    RowReader reader({file.info()}, {stored.datasets[0]}, {.threads = 1});
    std::vector<std::byte> memory(10 * kWidth * 4);
    const std::vector<std::uint64_t> rows(10, 5);
    CHECK_THROWS(std::invalid_argument, "no batch covers", reader.submit(0, rows));
    CHECK_THROWS(std::invalid_argument, "too small", reader.add_batch(0, 11, {memory}));
    CHECK_THROWS(std::invalid_argument, "one block of memory per dataset", reader.add_batch(0, 10, {}));
    CHECK_THROWS(std::invalid_argument, "count: 0", reader.add_batch(0, 0, {memory}));
    reader.add_batch(0, 10, {memory});
    CHECK_THROWS(std::invalid_argument, "overlap", reader.add_batch(9, 10, {memory}));
    CHECK_THROWS(std::logic_error, "not submitted", reader.wait(0, 1ms));
    CHECK_THROWS(std::invalid_argument, "out of range", reader.submit(0, std::vector<std::uint64_t>(10, kRows)));
    CHECK_THROWS(std::invalid_argument, "no batch covers", reader.submit(1, rows));
    reader.submit(0, rows);  // one row ten times
    wait(reader, 0);
    CHECK(std::memcmp(memory.data(), memory.data() + 9 * kWidth * 4, kWidth * 4) == 0);
}

}  // namespace

int main() {
    batches_hold_the_submitted_rows();
    segments_hold_ranges_of_rows();
#if defined(RWF_NOWAIT)
    cached_rows_are_read_without_threads();
#endif
    reader_can_be_destroyed_at_any_time();
    errors_are_reported_for_their_batches();
    changed_files_are_rejected();
    invalid_chunk_positions_are_errors();
    invalid_calls_are_rejected();
}
