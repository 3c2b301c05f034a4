// The byte-level filters of the HDF5 pipeline that are not compression: shuffle and fletcher32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <pybind11/pybind11.h>

namespace spinlock_fast {

// Undoes HDF5's shuffle filter: `in` holds byte 0 of every item, then byte 1 of every item, and so
// on; bytes beyond the last whole item follow unchanged. `out` has the size of `in` and does not
// overlap it.
void unshuffle(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out) noexcept;

// Fletcher's checksum over big-endian 16-bit words, an odd last byte padded with zero on the
// right, as HDF5's fletcher32 filter defines it.
std::uint32_t fletcher32(std::span<const std::byte> data) noexcept;

void register_byte_filters(pybind11::module_& module);

}  // namespace spinlock_fast
