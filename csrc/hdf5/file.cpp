#include "file.hpp"

#include "errors.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

namespace spinlock_fast {
namespace {

constexpr std::size_t kMaxOpenFiles = 32;
constexpr int kMaxWaits = 50;  // of 10 ms each, while other threads close their files

std::string reason(int error) { return std::generic_category().message(error); }

FileIdentity identify(int descriptor) {
    struct stat info{};
    if (::fstat(descriptor, &info) != 0) throw ReadError("cannot be examined: " + reason(errno));
#if defined(__APPLE__)
    const struct timespec& modified = info.st_mtimespec;
#else
    const struct timespec& modified = info.st_mtim;
#endif
    return {.device = static_cast<std::uint64_t>(info.st_dev),
            .inode = static_cast<std::uint64_t>(info.st_ino),
            .size = static_cast<std::uint64_t>(info.st_size),
            .mtime_ns = static_cast<std::int64_t>(modified.tv_sec) * 1'000'000'000 + modified.tv_nsec};
}

}  // namespace

File::File(const FileInfo& info) : identity_(info.identity), descriptor_(-1) {
    do {
        descriptor_ = ::open(info.path.c_str(), O_RDONLY | O_CLOEXEC);
    } while (descriptor_ < 0 && errno == EINTR);
    if (descriptor_ < 0 && (errno == EMFILE || errno == ENFILE))
        throw TooManyFiles("cannot be opened: " + reason(errno) + "; raise the limit with `ulimit -n`");
    if (descriptor_ < 0) throw ReadError("cannot be opened: " + reason(errno));
    try {
        if (identity_.inode == 0) {  // copied from a remote store after it was indexed
            identity_ = identify(descriptor_);
            if (identity_.size != info.identity.size)
                throw ReadError("holds " + std::to_string(identity_.size) + " bytes, expected " +
                                std::to_string(info.identity.size));
        } else {
            check_unchanged();
        }
    } catch (...) {
        ::close(descriptor_);
        throw;
    }
}

File::~File() { ::close(descriptor_); }

void File::read(std::span<std::byte> out, std::uint64_t offset) const {
    // This check also keeps every position within the range of off_t.
    if (offset > identity_.size || out.size() > identity_.size - offset)
        throw ReadError("lies beyond the end of the file (" + std::to_string(identity_.size) + " bytes)");
    while (!out.empty()) {
        const ::ssize_t got = ::pread(descriptor_, out.data(), out.size(), static_cast<::off_t>(offset));
        if (got < 0) {
            if (errno == EINTR) continue;
            throw ReadError("cannot be read: " + reason(errno));
        }
        if (got == 0) throw ReadError("the file has changed since it was opened: it became shorter");
        out = out.subspan(static_cast<std::size_t>(got));
        offset += static_cast<std::uint64_t>(got);
    }
}

bool File::read_cached([[maybe_unused]] std::span<std::byte> out,
                       [[maybe_unused]] std::uint64_t offset) const noexcept {
#if defined(RWF_NOWAIT)
    if (offset > identity_.size || out.size() > identity_.size - offset) return false;
    while (!out.empty()) {
        const struct iovec rest{.iov_base = out.data(), .iov_len = out.size()};
        const ::ssize_t got = ::preadv2(descriptor_, &rest, 1, static_cast<::off_t>(offset), RWF_NOWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        out = out.subspan(static_cast<std::size_t>(got));
        offset += static_cast<std::uint64_t>(got);
    }
    return true;
#else
    return false;
#endif
}

void File::check_unchanged() const {
    if (identify(descriptor_) != identity_) throw ReadError("the file has changed since it was opened");
}

// At the limit of open files, closes the least recently used ones. The descriptor of a file that another thread still
// reads is released when that thread drops its shared_ptr.
std::shared_ptr<const File> FileCache::open(const FileInfo& info) {
    for (int waited = 0;;) {
        try {
            return std::make_shared<const File>(info);
        } catch (const TooManyFiles&) {
            if (!open_.empty())
                open_.pop_back();
            else if (waited++ < kMaxWaits)
                std::this_thread::sleep_for(std::chrono::milliseconds(10));
            else
                throw;
        }
    }
}

std::shared_ptr<const File> FileCache::get(std::size_t index) {
    const std::scoped_lock lock(mutex_);
    const auto cached = std::ranges::find(open_, index, [](const auto& entry) { return entry.first; });
    if (cached != open_.end()) {
        open_.splice(open_.begin(), open_, cached);
    } else {
        open_.emplace_front(index, open(files_[index]));
        if (open_.size() > kMaxOpenFiles) open_.pop_back();
    }
    return open_.front().second;
}

}  // namespace spinlock_fast
