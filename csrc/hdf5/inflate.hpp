// zlib decompression with the fastest library found at build time.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace spinlock_fast {

// "libdeflate 1.26", "zlib 1.3.1", or "none": `Inflater::inflate` then always throws.
std::string inflate_library();

// Decodes zlib streams. Not thread-safe: its state is reused between calls.
class Inflater {
public:
    Inflater();
    ~Inflater();
    Inflater(Inflater&&) noexcept;
    Inflater& operator=(Inflater&&) noexcept;

    // Decodes a whole stream, verifies its checksum and returns the number of decoded bytes, or nullopt if `out` is too
    // small. Ignores bytes after the end of the stream, like libhdf5. Throws DecodeError.
    std::optional<std::size_t> inflate(std::span<const std::byte> in, std::span<std::byte> out);

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace spinlock_fast
