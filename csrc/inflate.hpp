// Undoing deflate, with the fastest library that the build found.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace spinlock_fast {

// "libdeflate 1.26", "zlib 1.3.1", or "none": then no Inflater can be made.
std::string inflate_library();

// Decodes zlib streams, one after the other; the state is reused, so one belongs to one thread.
class Inflater {
public:
    Inflater();
    ~Inflater();
    Inflater(Inflater&&) noexcept;
    Inflater& operator=(Inflater&&) noexcept;

    // Decodes a whole stream, checksum included, and returns the bytes that it holds; nothing where these are more than
    // `out`. Bytes after the end of the stream are ignored, as libhdf5 does. Throws DecodeError.
    std::optional<std::size_t> inflate(std::span<const std::byte> in, std::span<std::byte> out);

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace spinlock_fast
