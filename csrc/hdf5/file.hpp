// Positioned reads from files that must not change after they were indexed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace spinlock_fast {

// Identifies a file and its version: a difference in any field means another file or changed contents.
struct FileIdentity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::uint64_t size = 0;
    std::int64_t mtime_ns = 0;

    bool operator==(const FileIdentity&) const = default;
};

struct FileInfo {
    std::string path;
    std::string label;  // path for messages, UTF-8
    FileIdentity identity;  // inode 0: not known yet, only the size is compared when the file is opened
};

// An open file descriptor. Reads use pread, so threads may share it.
class File {
public:
    // Throws ReadError if the file is missing, not readable, or differs from `info.identity`.
    explicit File(const FileInfo& info);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    // Fills `out` from byte `offset` on. Throws ReadError if the file is shorter.
    void read(std::span<std::byte> out, std::uint64_t offset) const;

    // As `read`, but never waits for the disk. Returns false, with part of `out` overwritten, if not all bytes are in
    // the page cache or cannot be read, and on systems without such reads.
    bool read_cached(std::span<std::byte> out, std::uint64_t offset) const noexcept;

    // Throws ReadError if the file was modified since it was indexed; bytes read before are then invalid.
    void check_unchanged() const;

private:
    FileIdentity identity_;
    int descriptor_;
};

// Opens files on demand and keeps the most recently used ones open, so that thousands of shards need few descriptors.
class FileCache {
public:
    explicit FileCache(std::vector<FileInfo> files) : files_(std::move(files)) {}

    std::shared_ptr<const File> get(std::size_t index);
    const FileInfo& info(std::size_t index) const { return files_[index]; }
    std::size_t size() const noexcept { return files_.size(); }

private:
    std::shared_ptr<const File> open(const FileInfo& info);

    std::vector<FileInfo> files_;
    std::mutex mutex_;
    std::list<std::pair<std::size_t, std::shared_ptr<const File>>> open_;  // most recently used first
};

}  // namespace spinlock_fast
