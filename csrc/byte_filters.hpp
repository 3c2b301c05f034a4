// The byte-level filters of the HDF5 pipeline that are not compression, and the order of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace spinlock_fast {

// The widest instruction set that this processor offers: "avx512", "avx2", "sse2" or "portable".
std::string_view simd_level() noexcept;

// Which form of `unshuffle` runs.
enum class Simd { portable, sse2, avx2 };

// The widest form that this processor can run.
Simd best_simd() noexcept;

// Undoes HDF5's shuffle filter: `in` holds byte 0 of every item, then byte 1 of every item, and so
// on; bytes beyond the last whole item follow unchanged. `out` has the size of `in` and does not
// overlap it.
void unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out,
               Simd simd = best_simd()) noexcept;

// Reverses the bytes of every whole item, in place; sizes other than 2, 4 and 8 are left alone.
void swap_bytes(std::span<std::byte> data, std::size_t item_size) noexcept;

// Fletcher's checksum over big-endian 16-bit words, an odd last byte padded with zero on the
// right, as HDF5's fletcher32 filter defines it.
std::uint32_t fletcher32(std::span<const std::byte> data) noexcept;

}  // namespace spinlock_fast
