// The filters bitshuffle and lz4 of HDF5, which store independent blocks behind a header of big-endian sizes.
#pragma once

#include "filters.hpp"

namespace spinlock_fast {

// Decoded size according to the header. Throws DecodeError.
std::size_t block_filter_size(std::span<const std::byte> in);

// Decodes the filter lz4 to exactly `out.size()` bytes. Throws DecodeError.
void decode_lz4_filter(std::span<const std::byte> in, std::span<std::byte> out);

// Decodes bitshuffle with a codec to exactly `out.size()` bytes. Throws DecodeError.
void decode_bitshuffle(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out, Codecs& codecs);

// Inverts bitshuffle without a codec. Throws DecodeError.
void unshuffle_bit_blocks(const Filter& filter, std::span<const std::byte> in, std::span<std::byte> out,
                          Codecs& codecs);

// Inverts bitshuffle of one block; items beyond the last multiple of 8, and bytes beyond the last item, are copied.
void unshuffle_bits(std::span<const std::byte> in, std::size_t item_size, std::span<std::byte> out, Codecs& codecs);

}  // namespace spinlock_fast
