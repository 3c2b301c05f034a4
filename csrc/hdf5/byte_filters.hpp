// HDF5's shuffle and fletcher32 filters, bitshuffle, and byte order conversion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace spinlock_fast {

// Widest instruction set of this processor: "avx512", "avx2", "sse2" or "portable".
std::string_view simd_level() noexcept;

// Implementations of `unshuffle`.
enum class Simd { portable, sse2, avx2 };

// The widest implementation that this processor supports.
Simd best_simd() noexcept;

// Inverts HDF5's shuffle filter: with n whole items, out[i * item_size + b] = in[b * n + i]; bytes beyond the last
// whole item are copied. `out` has the size of `in` and does not overlap it.
void unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out,
               Simd simd = best_simd()) noexcept;

// Inverts bitshuffle: with n items, a multiple of 8, byte j of the plane in[(b * 8 + k) * n / 8 ...] has bit k of byte b of
// items 8 j to 8 j + 7, in ascending bits. `out` and `planes` have the size of `in` and do not overlap it or each other.
void bit_unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out,
                   std::span<std::byte> planes, Simd simd = best_simd()) noexcept;

// Reverses the bytes of every whole item in place; does nothing for item sizes other than 2, 4 and 8.
void swap_bytes(std::span<std::byte> data, std::size_t item_size) noexcept;

// Fletcher's checksum of HDF5's fletcher32 filter, over big-endian 16-bit words; an odd last byte is padded with zero.
std::uint32_t fletcher32(std::span<const std::byte> data) noexcept;

}  // namespace spinlock_fast
