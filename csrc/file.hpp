// Files that are read at given places, and that must stay what they were when they were indexed.
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

// What tells a file from another, and from its own later state.
struct FileIdentity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::uint64_t size = 0;
    std::int64_t mtime_ns = 0;

    bool operator==(const FileIdentity&) const = default;
};

struct FileName {
    std::string path;
    std::string label;  // the path as messages show it, in UTF-8
    FileIdentity identity;
};

// An open descriptor. Reading moves no position, so threads may share it.
class File {
public:
    // Throws ReadError where the file is missing, may not be read, or has changed.
    explicit File(const FileName& name);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    // All of `out` from byte `offset`; throws ReadError where the file ends before.
    void read(std::span<std::byte> out, std::uint64_t offset) const;

    // Throws ReadError where the file was written to since it was indexed: what was read of it is void.
    void check_unchanged() const;

private:
    FileIdentity identity_;
    int descriptor_;
};

// Opens files on demand and keeps the last few, so that shards by the thousand need few descriptors.
class FileCache {
public:
    explicit FileCache(std::vector<FileName> names) : names_(std::move(names)) {}

    std::shared_ptr<const File> get(std::size_t index);
    const FileName& name(std::size_t index) const { return names_[index]; }
    std::size_t size() const noexcept { return names_.size(); }

private:
    std::shared_ptr<const File> open(const FileName& name);

    std::vector<FileName> names_;
    std::mutex mutex_;
    std::list<std::pair<std::size_t, std::shared_ptr<const File>>> open_;  // the last used first
};

}  // namespace spinlock_fast
