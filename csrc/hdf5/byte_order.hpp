// Unaligned integers of file formats.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace spinlock_fast {

static_assert(std::endian::native == std::endian::little);

// The caller checks that `in` holds them.
inline std::uint32_t read_u32(std::span<const std::byte> in, std::size_t offset) noexcept {
    std::uint32_t value;
    std::memcpy(&value, in.data() + offset, sizeof value);
    return value;
}

inline std::uint32_t read_u32_big(std::span<const std::byte> in, std::size_t offset) noexcept {
    return __builtin_bswap32(read_u32(in, offset));
}

inline std::uint64_t read_u64_big(std::span<const std::byte> in, std::size_t offset) noexcept {
    std::uint64_t value;
    std::memcpy(&value, in.data() + offset, sizeof value);
    return __builtin_bswap64(value);
}

}  // namespace spinlock_fast
